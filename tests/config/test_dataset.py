"""The dataset TOML: what it builds, which level wins, and what is warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anima_peft.config.dataset_options import parse_resolution
from anima_peft.data.specs import DatasetSpec, SubsetSpec
from anima_peft.errors import InputError

from .conftest import PICTURES, dataset


def test_the_least_that_works(load_with) -> None:
    run = load_with(dataset='[[datasets]]\n[[datasets.subsets]]\nimage_dir = "~/p"\n')
    assert run.datasets == (DatasetSpec(subsets=(SubsetSpec(image_dir=Path("~/p").expanduser()),)),)
    assert run.warnings == ()


def test_everything_set(load_with) -> None:
    text = """
        [[datasets]]
        resolution = [768, 512]
        batch_size = 4
        enable_bucket = true
        min_bucket_reso = 320
        max_bucket_reso = 1280
        bucket_reso_steps = 32

        [[datasets.subsets]]
        image_dir = "a"
        num_repeats = 3
        caption_extension = "caption"
        class_tokens = "a cat"
        flip_aug = true

        [[datasets.subsets]]
        image_dir = "b"

        [[datasets]]
        resolution = "640"
        enable_bucket = true
        bucket_no_upscale = true

        [[datasets.subsets]]
        image_dir = "c"
        class_tokens = ""
    """
    first = DatasetSpec(
        subsets=(
            SubsetSpec(Path("a"), 3, ".caption", "a cat", True),
            SubsetSpec(Path("b")),
        ),
        resolution=(768, 512),
        batch_size=4,
        enable_bucket=True,
        min_bucket_reso=320,
        max_bucket_reso=1280,
        bucket_reso_steps=32,
    )
    second = DatasetSpec((SubsetSpec(Path("c")),), resolution=(640, 640), enable_bucket=True, bucket_no_upscale=True)
    assert load_with(dataset=text).datasets == (first, second)


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        (1024, (1024, 1024)),
        ([768, 512], (768, 512)),
        ("1024", (1024, 1024)),
        ("768,512", (768, 512)),
        ("[768, 512]", (768, 512)),
        ([640], (640, 640)),
    ],
)
def test_resolution(raw: Any, kept: tuple[int, int]) -> None:
    assert parse_resolution(raw) == kept


@pytest.mark.parametrize(
    "raw", [0, 15, -64, 512.0, "", "big", "1,2,3", [], [64, 64, 64], [64, "x"], [64, 1.5], {}, 65537, True]
)
def test_no_resolution(raw: Any) -> None:
    with pytest.raises(InputError, match=r"expected a side or \[width, height\] in pixels from 16 to 65536, got "):
        parse_resolution(raw)


def test_subset_beats_dataset_beats_general_beats_train_args_beats_default(load_with) -> None:
    def repeats(train: dict[str, Any], general: str = "", keys: str = "", subset: str = "") -> int:
        return load_with(train, dataset(keys, subset, general)).datasets[0].subsets[0].num_repeats

    assert repeats({}) == 1
    assert repeats({"dataset_repeats": 2}) == 2
    assert repeats({"num_repeats": 1}, "num_repeats = 3") == 3
    assert repeats({}, "num_repeats = 3", "num_repeats = 4") == 4
    assert repeats({}, "num_repeats = 3", "num_repeats = 4", "num_repeats = 5") == 5


def test_train_args_and_flags_fill_what_the_dataset_leaves_open(load_with) -> None:
    train = {"train_batch_size": 2, "resolution": "512,512", "enable_bucket": True, "caption_extention": ".caption"}
    (spec,) = load_with(
        train, dataset(), ("--train_batch_size", "3", "--flip_aug", "--min_bucket_reso", "128")
    ).datasets
    assert (spec.batch_size, spec.resolution, spec.enable_bucket, spec.min_bucket_reso) == (3, (512, 512), True, 128)
    assert spec.subsets[0] == SubsetSpec(Path("pictures"), caption_extension=".caption", flip_aug=True)


def test_batch_size_of_the_dataset_beats_that_of_the_train_args(load_with) -> None:
    text = dataset("batch_size = 4")
    assert load_with({"train_batch_size": 4}, text).datasets[0].batch_size == 4
    assert load_with({"train_batch_size": 1}, text).datasets[0].batch_size == 4
    with pytest.raises(
        InputError, match=r"train_batch_size: has no effect, because the dataset TOML sets datasets\[0\]"
    ):
        load_with({"train_batch_size": 2}, text)
    # it serves the other dataset
    both = load_with({"train_batch_size": 2}, text + "[[datasets]]\n" + PICTURES)
    assert [spec.batch_size for spec in both.datasets] == [4, 2]


def test_a_flag_that_the_dataset_beats_is_warned_of(load_with) -> None:
    run = load_with(None, dataset("batch_size = 4"), ("--train_batch_size", "1"))
    (warning,) = run.warnings
    assert warning == "--train_batch_size 1 has no effect, because the dataset TOML sets datasets[0].batch_size = 4."


@pytest.mark.parametrize(
    ("keys", "squeezed"),
    [
        ("enable_bucket = true", True),
        ("enable_bucket = true\nmax_bucket_reso = 1536", False),
        ("enable_bucket = true\nbucket_no_upscale = true", False),
        ("", False),
    ],
)
def test_a_resolution_as_large_as_the_largest_bucket_is_warned_of(load_with, keys: str, squeezed: bool) -> None:
    warnings = load_with(dataset=dataset(f"resolution = 1024\n{keys}")).warnings
    assert len(warnings) == squeezed
    if squeezed:
        assert warnings[0].startswith("datasets[0].resolution = 1024 is as large as max_bucket_reso = 1024")
        assert warnings[0].endswith("set max_bucket_reso = 1536.")


def test_bucket_keys_in_general_may_serve_one_dataset_only(load_with) -> None:
    text = f"[general]\nbucket_reso_steps = 32\n[[datasets]]\nenable_bucket = true\n{PICTURES}[[datasets]]\n{PICTURES}"
    assert [spec.bucket_reso_steps for spec in load_with(dataset=text).datasets] == [32, 32]


def test_neutral_values_of_other_trainers_are_taken(load_with) -> None:
    load_with(dataset=dataset(general="shuffle_caption = false\nkeep_tokens = 0\ncaption_separator = ','\n"))


def test_a_caption_key_in_general_may_serve_one_subset_only(load_with) -> None:
    text = f"[general]\nkeep_tokens = 1\n[[datasets]]\n{PICTURES}shuffle_caption = true\n"
    text += '[[datasets.subsets]]\nimage_dir = "q"\n'
    assert [s.captions.keep_tokens for s in load_with(dataset=text).datasets[0].subsets] == [1, 1]


def test_bucket_bounds_beside_no_upscale_are_warned_of(load_with) -> None:
    keys = "enable_bucket = true\nmax_bucket_reso = 2048\nbucket_no_upscale = true"
    (warning,) = load_with(dataset=dataset(keys)).warnings
    assert warning == "datasets[0].max_bucket_reso has no effect with bucket_no_upscale = true; remove it."

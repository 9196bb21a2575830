"""The dataset TOML: what it builds, which level wins, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anima_peft.config.dataset_options import parse_resolution
from anima_peft.data.specs import CaptionSpec, DatasetSpec, SubsetSpec
from anima_peft.errors import InputError

PICTURES = '[[datasets.subsets]]\nimage_dir = "p"\n'
BUCKETS = "enable_bucket = true\nmax_bucket_reso = 2048\n"


def dataset(keys: str = "", subset: str = "", general: str = "") -> str:
    return f"[general]\n{general}\n[[datasets]]\n{keys}\n{PICTURES}{subset}\n"


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
    assert spec.subsets[0] == SubsetSpec(Path("p"), caption_extension=".caption", flip_aug=True)


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


FAULTS = [
    # structure
    ("", "datasets: expected at least one table, written [[datasets]], got none"),
    ("[datasets]\nresolution = 512", "datasets: expected at least one table, written [[datasets]], got a table"),
    ("[[datasets]]", "datasets[0].subsets: expected at least one table, written [[datasets.subsets]], got none"),
    ("general = 1\n[[datasets]]\n" + PICTURES, "general: expected a table, written [general], got 1"),
    (dataset() + "[genral]", "genral: unknown in a dataset TOML, which holds [general] and [[datasets]]; did you mean"),
    (
        "flip_aug = true\n" + dataset(),
        "flip_aug: unknown in a dataset TOML, which holds [general] and [[datasets]]; it",
    ),
    ("[[datasets]]\n[[datasets.subsets]]", "datasets[0].subsets[0].image_dir: required, but not given."),
    # names and places
    (dataset("resolutoin = 512"), 'datasets[0].resolutoin: unknown option; did you mean "resolution"?'),
    (dataset("image_dir = 'x'"), "datasets[0].image_dir: belongs into [[datasets.subsets]]"),
    (dataset(general="subsets = 1"), "general.subsets: belongs into a [[datasets]] table, as [[datasets.subsets]]"),
    (dataset(subset="resolution = 64"), "datasets[0].subsets[0].resolution: belongs into [[datasets]] or [general]"),
    # values
    (
        dataset("resolution = 1000"),
        "datasets[0].resolution: expected multiples of 16 where enable_bucket is off, got [",
    ),
    (dataset("resolution = [64, 8]"), "datasets[0].resolution: expected a side or [width, height] in pixels"),
    (dataset("batch_size = 0"), "datasets[0].batch_size: expected an integer of at least 1, got 0"),
    (
        dataset(subset="num_repeats = 1.5"),
        "datasets[0].subsets[0].num_repeats: expected an integer of at least 1, got 1",
    ),
    (dataset(subset="flip_aug = 'no'"), 'datasets[0].subsets[0].flip_aug: expected true or false, got "no"'),
    (dataset(subset="caption_extension = '/x'"), "caption_extension: expected the suffix of caption files such as"),
    (dataset(subset="image_dir2 = 1"), 'image_dir2: unknown option; did you mean "image_dir"?'),
    # buckets
    (dataset(BUCKETS + "bucket_reso_steps = 24"), "datasets[0].bucket_reso_steps: expected a multiple of 16, got 24"),
    (
        dataset(BUCKETS + "min_bucket_reso = 200"),
        "min_bucket_reso: expected a multiple of bucket_reso_steps = 64, got 2",
    ),
    (dataset(BUCKETS + "bucket_reso_steps = 256\nresolution = 640\nmin_bucket_reso = 768"), "lower min_bucket_reso"),
    (
        dataset(BUCKETS + "resolution = 192"),
        "datasets[0].resolution: expected at least min_bucket_reso = 256, got [192",
    ),
    (
        dataset(BUCKETS + "resolution = 3000"),
        "datasets[0].resolution: expected at most max_bucket_reso = 2048, got [3000",
    ),
    (
        dataset("enable_bucket = true\nbucket_no_upscale = true\nresolution = 32"),
        "datasets[0].resolution: expected at least bucket_reso_steps = 64, got [32, 32]",
    ),
    # no effect
    (dataset("max_bucket_reso = 2048"), "max_bucket_reso: has no effect with enable_bucket = false; set enable_bucket"),
    (
        dataset("bucket_no_upscale = true"),
        "bucket_no_upscale: has no effect with enable_bucket = false; set enable_buc",
    ),
    (dataset("keep_tokens = 1"), "datasets[0].keep_tokens: has no effect without shuffle_caption, caption_tag_dropout"),
    (dataset("token_warmup_min = 2"), "datasets[0].token_warmup_min: has no effect with token_warmup_step = 0"),
    (dataset("caption_separator = ';'"), "datasets[0].caption_separator: has no effect without shuffle_caption"),
    (
        dataset(subset="metadata_file = 'm.json'\ncaption_extension = '.cap'"),
        'datasets[0].subsets[0].caption_extension: has no effect with metadata_file = "m.json"',
    ),
    (
        dataset(subset="conditioning_data_dir = 'm'"),
        "conditioning_data_dir: has no effect without masked_loss = true in the train args; add it",
    ),
    # values of captions
    (dataset("shuffle_caption = 1"), "datasets[0].shuffle_caption: expected true or false, got 1"),
    (dataset("caption_dropout_rate = 1.5"), "caption_dropout_rate: expected a number from 0 to 1, got 1.5"),
    (dataset("token_warmup_step = 1.5"), "token_warmup_step: expected an integer number of steps or a share below 1"),
    (dataset("resize_interpolation = 'lancos'"), 'resize_interpolation: expected one of "area", "box", "nearest"'),
    (dataset("skip_image_resolution = 1"), "skip_image_resolution: expected a side or [width, height] in pixels"),
    # places
    (
        "[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2",
        "datasets[0].subsets[0].image_dir: required, but not given. Folder of the pictures; with metadata_file, where",
    ),
    (
        dataset() + PICTURES,
        "datasets[0].subsets[1]: names the same pictures as datasets[0].subsets[0]; sd-scripts ignores the second.",
    ),
    (dataset(general="is_reg = true"), "general.is_reg: belongs into [[datasets.subsets]]"),
    (dataset(general="bucket_reso_steps = 32"), "general.bucket_reso_steps: has no effect with enable_bucket = false"),
    # options of other trainers
    (
        dataset(general="validation_split = 0.1"),
        "validation_split: has no effect without one of validate_every_n_steps",
    ),
    (dataset(general="validation_split = 1.0"), "general.validation_split: "),
    (dataset(general="validation_seed = 1"), "general.validation_seed: has no effect"),
    (
        dataset(subset="face_crop_aug_range = [1, 3]"),
        "face_crop_aug_range: not supported in this version: use",
    ),
]


@pytest.mark.parametrize(("text", "fault"), FAULTS, ids=range(len(FAULTS)))
def test_one_fault_in_the_dataset_toml(load_with, text: str, fault: str) -> None:
    with pytest.raises(InputError) as report:
        load_with(dataset=text)
    heading, *found = str(report.value).split("\n  - ")
    assert [fault in one for one in found] == [True], str(report.value)
    assert "dataset.toml" in heading


def test_bounds_in_the_wrong_order(load_with) -> None:
    text = dataset("enable_bucket = true\nresolution = 512\nmin_bucket_reso = 1024\nmax_bucket_reso = 512")
    with pytest.raises(InputError, match=r"min_bucket_reso: expected at most max_bucket_reso = 512, got 1024"):
        load_with(dataset=text)


def test_one_fault_in_general_is_reported_once_for_all_datasets(load_with) -> None:
    text = f"[general]\nresolution = 1000\n[[datasets]]\n{PICTURES}[[datasets]]\n{PICTURES}"
    with pytest.raises(InputError) as report:
        load_with(dataset=text)
    assert str(report.value).count("general.resolution: expected multiples of 16") == 1


def test_neutral_values_of_other_trainers_are_taken(load_with) -> None:
    load_with(dataset=dataset(general="shuffle_caption = false\nkeep_tokens = 0\ncaption_separator = ','\n"))


def test_a_faulty_dataset_key_is_not_also_said_to_hide_the_train_args(load_with) -> None:
    with pytest.raises(InputError) as report:
        load_with({"train_batch_size": 2}, dataset("batch_size = 0"))
    assert str(report.value).count("\n") == 1


# Dataset files as sd-scripts' documentation shows them (docs/config_README-en.md, docs/masked_loss_README.md).
TWO_WAYS = r"""
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

# This is a DreamBooth-style dataset
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'C:\hoge'
  class_tokens = 'hoge girl'

  [[datasets.subsets]]
  image_dir = 'C:\fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'C:\reg'
  class_tokens = 'human'
  keep_tokens = 1

# This is a fine-tuning dataset
[[datasets]]
resolution = [768, 768]
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'C:\piyo'
  metadata_file = 'C:\piyo\piyo_md.json'
"""
THREE_RESOLUTIONS = r"""
[general]
enable_bucket = true
bucket_no_upscale = true
max_bucket_reso = 1536

[[datasets]]
resolution = 768
  [[datasets.subsets]]
  image_dir = 'C:\hoge'

[[datasets]]
resolution = 1024
skip_image_resolution = 768
  [[datasets.subsets]]
  image_dir = 'C:\hoge'

[[datasets]]
resolution = 1280
skip_image_resolution = 1024
  [[datasets.subsets]]
  image_dir = 'C:\hoge'
"""
SEPARATORS = """
[general]
flip_aug = true
color_aug = false
resolution = [1024, 1024]

[[datasets]]
batch_size = 6
enable_bucket = true
bucket_no_upscale = true
caption_extension = ".txt"
keep_tokens_separator= "|||"
shuffle_caption = true
caption_tag_dropout_rate = 0.1
secondary_separator = ";;;" # subset 側に書くこともできます / can be written in the subset side
enable_wildcard = true # 同上 / same as above

  [[datasets.subsets]]
  image_dir = "/path/to/image_dir"
  num_repeats = 1
  caption_prefix = "1girl, hatsune miku, vocaloid |||"
  caption_suffix = ", anime screencap ||| masterpiece, rating: general"
"""
MASKED = """
[[datasets]]
  [[datasets.subsets]]
  image_dir = "/path/to/image_dir"
  caption_extension = ".txt"
  conditioning_data_dir = "/path/to/mask_dir"
  num_repeats = 8
"""
IN_SD_SCRIPTS_WORDS = [
    (
        TWO_WAYS,
        (
            DatasetSpec(
                tuple(
                    SubsetSpec(
                        Path("C:\\" + name),
                        class_tokens=tokens,
                        is_reg=name == "reg",
                        captions=CaptionSpec(shuffle_caption=True, keep_tokens=keep),
                    )
                    for name, tokens, keep in (("hoge", "hoge girl", 2), ("fuga", "fuga boy", 3), ("reg", "human", 1))
                ),
                resolution=(512, 512),
                batch_size=4,
            ),
            DatasetSpec(
                (
                    SubsetSpec(
                        Path("C:\\piyo"),
                        metadata_file=Path("C:\\piyo\\piyo_md.json"),
                        captions=CaptionSpec(shuffle_caption=True, keep_tokens=1),
                    ),
                ),
                resolution=(768, 768),
                batch_size=2,
            ),
        ),
    ),
    (
        THREE_RESOLUTIONS,
        tuple(
            DatasetSpec(
                (SubsetSpec(Path("C:\\hoge")),),
                resolution=(side, side),
                enable_bucket=True,
                max_bucket_reso=1536,
                bucket_no_upscale=True,
                skip_image_resolution=skipped,
            )
            for side, skipped in ((768, None), (1024, (768, 768)), (1280, (1024, 1024)))
        ),
    ),
    (
        SEPARATORS,
        (
            DatasetSpec(
                (
                    SubsetSpec(
                        Path("/path/to/image_dir"),
                        flip_aug=True,
                        captions=CaptionSpec(
                            caption_prefix="1girl, hatsune miku, vocaloid |||",
                            caption_suffix=", anime screencap ||| masterpiece, rating: general",
                            keep_tokens_separator="|||",
                            shuffle_caption=True,
                            caption_tag_dropout_rate=0.1,
                            secondary_separator=";;;",
                            enable_wildcard=True,
                        ),
                    ),
                ),
                batch_size=6,
                enable_bucket=True,
                bucket_no_upscale=True,
            ),
        ),
    ),
    (
        MASKED,
        (
            DatasetSpec(
                (SubsetSpec(Path("/path/to/image_dir"), 8, conditioning_data_dir=Path("/path/to/mask_dir")),),
            ),
        ),
    ),
]


@pytest.mark.parametrize(
    ("text", "specs"), IN_SD_SCRIPTS_WORDS, ids=["two ways", "three resolutions", "separators", "masked"]
)
def test_files_of_sd_scripts_documentation_mean_the_same(load_with, text: str, specs: tuple[DatasetSpec, ...]) -> None:
    run = load_with({"masked_loss": True} if text is MASKED else None, text)
    assert run.datasets == specs
    # Bounds of buckets that do nothing beside bucket_no_upscale, as that documentation writes them.
    assert len(run.warnings) == (text is THREE_RESOLUTIONS)


def test_a_caption_key_in_general_may_serve_one_subset_only(load_with) -> None:
    text = f"[general]\nkeep_tokens = 1\n[[datasets]]\n{PICTURES}shuffle_caption = true\n"
    text += '[[datasets.subsets]]\nimage_dir = "q"\n'
    assert [s.captions.keep_tokens for s in load_with(dataset=text).datasets[0].subsets] == [1, 1]


def test_bucket_bounds_beside_no_upscale_are_warned_of(load_with) -> None:
    (warning,) = load_with(dataset=dataset(BUCKETS + "bucket_no_upscale = true")).warnings
    assert warning == "datasets[0].max_bucket_reso has no effect with bucket_no_upscale = true; remove it."

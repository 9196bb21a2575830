"""What is wrong with a dataset TOML is named, once, with its place."""

from __future__ import annotations

import pytest

from anima_peft.errors import InputError

from .conftest import PICTURES, dataset

BUCKETS = "enable_bucket = true\nmax_bucket_reso = 2048\n"
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


def test_a_faulty_dataset_key_is_not_also_said_to_hide_the_train_args(load_with) -> None:
    with pytest.raises(InputError) as report:
        load_with({"train_batch_size": 2}, dataset("batch_size = 0"))
    assert str(report.value).count("\n") == 1

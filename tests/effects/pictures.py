"""Effects of the dataset options."""

from __future__ import annotations

import torch

from anima_peft.data import load_pixels

from .bench import DATASET, Built, Effect, Refused

BUCKET_BOUNDS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")


def buckets(built: Built) -> set[tuple[int, int]]:
    return {picture.placement.bucket for picture in built.pictures}


def captions(built: Built) -> list[str]:
    return [picture.caption for picture in built.pictures]


def pixels(built: Built) -> torch.Tensor:
    return torch.stack([load_pixels(picture, flip=False).mean() for picture in built.pictures])


def masks(built: Built) -> list[tuple[str, bool] | None]:
    """The folder and kind of each picture's mask."""
    found = (picture.mask for picture in built.pictures)
    return [mask and (mask.path.parent.name, mask.from_alpha) for mask in found]


def repeats(built: Built) -> list[int]:
    return [picture.num_repeats for picture in built.pictures]


def weights(built: Built) -> list[float | None]:
    return [sample["loss_weight"].item() if "loss_weight" in sample else None for sample in built.samples()]


def held_out(built: Built) -> list[str]:
    return [picture.path.name for picture in built.pictures if picture.held_out]


MEASURED = ("--validation_split", "0.25", "--validate_every_n_steps", "1")
OTHERS = "[[datasets.subsets]]\nimage_dir = '{other_pictures}'\n"
MASKED = "conditioning_data_dir = '{masks}'\n"
REGULAR = f"{DATASET}{OTHERS}is_reg = true\n"

EFFECTS = {
    "skip_image_resolution": Effect(("--skip_image_resolution", "64"), lambda built: len(built.pictures), 4, 2),
    "resize_interpolation": Effect(("--resize_interpolation", "nearest"), pixels, beside=("--resolution", "48")),
    "validation_split": Effect(("--validation_split", "0.5"), lambda built: len(held_out(built)), 1, 2, MEASURED),
    "validation_seed": Effect(("--validation_seed", "3"), held_out, beside=MEASURED),
    "color_aug": Effect(("--color_aug",), lambda built: {p.color_aug for p in built.pictures}, {False}, {True}),
    "random_crop": Effect(("--random_crop",), lambda built: {p.random_crop for p in built.pictures}, {False}, {True}),
    "alpha_mask": Effect(("--alpha_mask",), masks, [None] * 4, [("pictures", True)] * 4),
    "metadata_file": Effect(
        (),
        lambda built: [(picture.path.name, picture.caption) for picture in built.pictures][-1:],
        [("03.png", "yellow circle, grey background")],
        [("02.png", "named")],
        dataset=f"{DATASET}metadata_file = '{{pictures}}/meta.json'\n",
    ),
    "conditioning_data_dir": Effect(
        (),
        masks,
        [("masks", False)] * 4 + [None] * 2,
        [("masks", False)] * 4 + [("other_pictures", False)] * 2,
        ("--masked_loss",),
        dataset=f"{DATASET}{MASKED}{OTHERS}conditioning_data_dir = '{{other_pictures}}'\n",
        base=f"{DATASET}{MASKED}{OTHERS}",
    ),
    "masked_loss": Refused(
        ("--no-masked_loss",), "conditioning_data_dir: has no effect without masked_loss", DATASET + MASKED
    ),
    "is_reg": Effect((), repeats, [1] * 6, [1] * 4 + [2] * 2, dataset=REGULAR, base=DATASET + OTHERS),
    "prior_loss_weight": Effect(
        ("--prior_loss_weight", "0.5"), weights, [None] * 8, [1.0] * 4 + [0.5] * 4, base=REGULAR
    ),
    "resolution": Effect(
        ("--resolution", "96"), buckets, {(64, 64), (80, 48), (48, 80)}, {(96, 96), (112, 80), (80, 112)}
    ),
    "enable_bucket": Effect(
        ("--enable_bucket",),
        buckets,
        {(512, 512)},
        {(512, 512), (640, 384), (384, 640)},
        ("--resolution", "512"),
        ("enable_bucket", *BUCKET_BOUNDS),
    ),
    "min_bucket_reso": Effect(("--min_bucket_reso", "64"), buckets, {(64, 64), (80, 48), (48, 80)}, {(64, 64)}),
    "max_bucket_reso": Effect(
        ("--max_bucket_reso", "64"), buckets, {(64, 64), (80, 48), (48, 80)}, {(64, 64), (64, 48), (48, 64)}
    ),
    "bucket_reso_steps": Effect(
        ("--bucket_reso_steps", "32"), buckets, {(64, 64), (80, 48), (48, 80)}, {(64, 64), (32, 96)}
    ),
    "bucket_no_upscale": Effect(
        ("--bucket_no_upscale",),
        buckets,
        {(512, 512), (640, 384), (384, 640)},
        {(64, 64)},
        ("--resolution", "512", "--enable_bucket"),
        BUCKET_BOUNDS,
    ),
    "batch_size": Effect(
        (),
        lambda built: {picture.batch_size for picture in built.pictures},
        {1},
        {3},
        dataset=DATASET.replace("[[datasets]]\n", "[[datasets]]\nbatch_size = 3\n"),
    ),
    "num_repeats": Effect(("--num_repeats", "3"), lambda built: {p.num_repeats for p in built.pictures}, {1}, {3}),
    "caption_extension": Effect(
        ("--caption_extension", ".cap"), lambda built: captions(built)[0] == "another caption", False, True
    ),
    "class_tokens": Effect(
        ("--class_tokens", "a shape"),
        captions,
        ["another caption", "", "", ""],
        ["another caption", *["a shape"] * 3],
        ("--caption_extension", ".cap"),
    ),
    "flip_aug": Effect(
        ("--flip_aug",), lambda built: {picture.flip_aug for picture in built.pictures}, {False}, {True}
    ),
    "image_dir": Effect(
        (),
        lambda built: [picture.path.name for picture in built.pictures],
        ["00.png", "01.png", "02.png", "03.png"],
        ["04.png", "05.png"],
        dataset=DATASET.replace("{pictures}", "{other_pictures}"),
    ),
}

"""Effects of the dataset options."""

from __future__ import annotations

from .bench import DATASET, Built, Effect

BUCKET_BOUNDS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")


def buckets(built: Built) -> set[tuple[int, int]]:
    return {picture.placement.bucket for picture in built.pictures}


def captions(built: Built) -> list[str]:
    return [picture.caption for picture in built.pictures]


EFFECTS = {
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

"""Buckets against a search of all sizes, and against values computed with sd-scripts' own code."""

from __future__ import annotations

import random

import pytest

from anima_peft.data import DatasetSpec, bucket_resolutions, place
from anima_peft.errors import InputError


def bucket_spec(
    resolution: tuple[int, int], min_size: int, max_size: int, step: int, no_upscale: bool = False
) -> DatasetSpec:
    return DatasetSpec((), resolution, 1, True, min_size, max_size, step, no_upscale)


def search(resolution: tuple[int, int], min_size: int, max_size: int, step: int) -> set[tuple[int, int]]:
    """Of each width the tallest bucket within the area, of each height the widest, and the largest square."""
    area = resolution[0] * resolution[1]
    sides = range(step, max_size + 1, step)
    square = max(side for side in sides if side * side <= area)
    found = {(square, square)}
    for width in sides:
        heights = [height for height in sides if width >= min_size <= height and width * height <= area]
        if heights:
            found |= {(width, max(heights)), (max(heights), width)}
    return found


@pytest.mark.parametrize("step", [16, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("resolution", [(512, 512), (768, 512), (1000, 1000), (1024, 1536)])
@pytest.mark.parametrize(("low", "high"), [(1, 24), (2, 32), (3, 96)])
def test_resolutions_equal_a_search_of_all_sizes(resolution: tuple[int, int], low: int, high: int, step: int) -> None:
    min_size, max_size = low * step, max(high * step, -(-max(resolution) // step) * step)
    buckets = bucket_resolutions(resolution, min_size, max_size, step)
    assert list(buckets) == sorted(search(resolution, min_size, max_size, step))


def test_resolutions_are_those_of_sd_scripts() -> None:
    half = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)]
    expected = sorted([*half, (512, 512), *((height, width) for width, height in half)])
    assert list(bucket_resolutions((512, 512), 256, 1024, 64)) == expected


def test_limits_are_rounded_outwards_to_the_step() -> None:
    assert bucket_resolutions((512, 512), 300, 1000, 64) == bucket_resolutions((512, 512), 256, 1024, 64)


# Computed with kohya-ss/sd-scripts, `make_bucket_resolutions` and `BucketManager.select_bucket`.
@pytest.mark.parametrize(
    ("spec", "size", "bucket", "resized"),
    [
        (bucket_spec((1024, 1024), 256, 2048, 64), (1920, 1080), (1344, 768), (1365, 768)),
        (bucket_spec((1024, 1024), 256, 1024, 64), (1920, 1080), (1024, 576), (1024, 576)),
        (bucket_spec((1024, 1024), 256, 2048, 64), (1000, 1500), (832, 1216), (832, 1248)),
        (bucket_spec((1024, 1024), 256, 2048, 64), (300, 4000), (256, 2048), (256, 3413)),
        (bucket_spec((1024, 1024), 256, 2048, 64), (1024, 1024), (1024, 1024), (1024, 1024)),
        (bucket_spec((768, 512), 256, 1024, 64), (640, 480), (704, 512), (704, 528)),
        (bucket_spec((512, 512), 256, 1024, 16), (333, 517), (400, 640), (412, 640)),
        (bucket_spec((512, 512), 128, 768, 48), (700, 701), (480, 480), (480, 481)),
        (bucket_spec((1024, 1024), 256, 1024, 64, no_upscale=True), (1920, 1080), (1344, 768), (1365, 768)),
        (bucket_spec((1024, 1024), 256, 1024, 64, no_upscale=True), (700, 500), (640, 448), (700, 500)),
        (bucket_spec((1024, 1024), 256, 1024, 16, no_upscale=True), (3000, 1999), (1248, 832), (1249, 832)),
        (bucket_spec((512, 512), 256, 1024, 64, no_upscale=True), (1333, 401), (832, 256), (851, 256)),
        (DatasetSpec((), (512, 768)), (1000, 1000), (512, 768), (768, 768)),
    ],
)
def test_placement_is_that_of_sd_scripts(
    spec: DatasetSpec, size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int]
) -> None:
    placement = place(size, spec)
    assert (placement.bucket, placement.resized) == (bucket, resized)
    assert placement.crop == ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)


@pytest.mark.parametrize("no_upscale", [False, True])
@pytest.mark.parametrize("step", [16, 64, 112])
def test_properties_of_any_placement(step: int, no_upscale: bool) -> None:
    rng = random.Random(step)
    for _ in range(500):
        resolution = (rng.randint(256, 1600), rng.randint(256, 1600))
        size = (rng.randint(step, 4000), rng.randint(step, 4000))
        spec = bucket_spec(resolution, 2 * step, 2048, step, no_upscale)
        if no_upscale and max(size) / min(size) > 8:
            continue  # may be too thin, see below
        placement = place(size, spec)
        for side in (0, 1):
            assert placement.bucket[side] % 16 == 0
            assert 0 <= placement.crop[side] <= placement.resized[side] - placement.bucket[side]
            assert abs(placement.resized[side] - placement.bucket[side] - 2 * placement.crop[side]) <= 1
            if no_upscale:
                assert placement.resized[side] <= size[side]
        if not no_upscale:
            buckets = bucket_resolutions(resolution, 2 * step, 2048, step)
            error = abs(placement.bucket[0] / placement.bucket[1] - size[0] / size[1])
            assert size in buckets or error == min(abs(w / h - size[0] / size[1]) for w, h in buckets)
            assert placement.bucket[0] == placement.resized[0] or placement.bucket[1] == placement.resized[1]


@pytest.mark.parametrize(
    ("spec", "size", "words"),
    [
        (bucket_spec((512, 512), 256, 1024, 24), (9, 9), "bucket_reso_steps = 24"),
        (bucket_spec((512, 512), 256, 1024, 0, no_upscale=True), (9, 9), "bucket_reso_steps = 0"),
        (bucket_spec((512, 128), 256, 1024, 64), (9, 9), "min_bucket_reso"),
        (bucket_spec((512, 1088), 256, 1024, 64), (9, 9), "max_bucket_reso"),
        (DatasetSpec((), (500, 512)), (9, 9), "500 x 512: without enable_bucket"),
        (bucket_spec((512, 512), 256, 1024, 64, no_upscale=True), (40, 600), "bucket_no_upscale"),
        (bucket_spec((512, 512), 256, 1024, 64, no_upscale=True), (20000, 70), "bucket_no_upscale"),
    ],
)
def test_sizes_that_allow_no_bucket(spec: DatasetSpec, size: tuple[int, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        place(size, spec)

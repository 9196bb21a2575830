"""Aspect-ratio buckets: the size each picture is trained at, by sd-scripts' algorithm.

All sizes are pixels, (width, height). Sides of buckets are multiples of 16: the VAE shrinks by 8 and the DiT reads
patches of 2 x 2 latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ..errors import InputError
from .specs import DatasetSpec

SIDE_MULTIPLE = 16
VAE_FACTOR = 8
"""Pixels of a picture's side to one of its latents'."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How a picture gets into its bucket: resized as a whole, then cropped."""

    bucket: tuple[int, int]
    """(width, height) after the crop, multiples of 16."""
    resized: tuple[int, int]
    """(width, height) that the whole picture is resized to; covers `bucket`."""
    crop: tuple[int, int]
    """(left, top) of the bucket within the resized picture."""


@lru_cache(maxsize=64)
def bucket_resolutions(
    resolution: tuple[int, int], min_size: int, max_size: int, step: int
) -> tuple[tuple[int, int], ...]:
    """The (width, height) of every bucket, sorted; none has more than the area of `resolution`.

    For each width from `min_size` to `max_size` by `step`: the tallest height that is a multiple of `step`, keeps the
    area and stays within the limits; its transpose; and the largest square. `min_size` is rounded down and `max_size`
    up to a multiple of `step`. Source: kohya-ss/sd-scripts, library/model_util.py `make_bucket_resolutions`, and
    library/train_util.py `BaseDataset.adjust_min_max_bucket_reso_by_steps`.

    Raises:
        InputError: `step` is not a positive multiple of 16, or `resolution` lies outside of the limits.
    """
    _check_step(step)
    min_size = max(_floor(min_size, step), step)
    max_size = -_floor(-max_size, step)
    if min(resolution) < min_size:
        raise InputError(
            f"resolution {_text(resolution)} is below the shortest side of a bucket, {min_size}: "
            "raise resolution, or lower min_bucket_reso or bucket_reso_steps"
        )
    if max(resolution) > max_size:
        raise InputError(
            f"resolution {_text(resolution)} is above the longest side of a bucket, {max_size}: "
            "lower resolution or raise max_bucket_reso"
        )
    area = resolution[0] * resolution[1]
    side = _floor(math.isqrt(area), step)
    found = {(side, side)}
    for width in range(min_size, max_size + 1, step):
        height = min(max_size, _floor(area // width, step))
        if height >= min_size:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def predefined_buckets(spec: DatasetSpec) -> tuple[tuple[int, int], ...]:
    """The (width, height) of the buckets that follow from `spec` alone.

    Empty with `enable_bucket` and `bucket_no_upscale`, where the pictures make their own.

    Raises:
        InputError: the sizes in `spec` allow no buckets.
    """
    if not spec.enable_bucket:
        if min(spec.resolution) <= 0 or any(side % SIDE_MULTIPLE for side in spec.resolution):
            raise InputError(
                f"resolution {_text(spec.resolution)}: without enable_bucket, expected two positive multiples of "
                f"{SIDE_MULTIPLE}"
            )
        return (spec.resolution,)
    if spec.bucket_no_upscale:
        _check_step(spec.bucket_reso_steps)
        return ()
    return bucket_resolutions(spec.resolution, spec.min_bucket_reso, spec.max_bucket_reso, spec.bucket_reso_steps)


def place(image_size: tuple[int, int], spec: DatasetSpec) -> Placement:
    """Bucket, resize and centre crop of a picture of `image_size` (width, height).

    With `enable_bucket`: the bucket with the nearest ratio of width to height. With `bucket_no_upscale` as well: the
    picture's own size, shrunk to the area of `resolution` where it is above it, cut down to multiples of the step.
    Without `enable_bucket`: `resolution` itself. Source: kohya-ss/sd-scripts, library/train_util.py
    `BucketManager.select_bucket`, `BaseDataset.make_buckets` and `trim_and_resize_if_required`.

    Raises:
        InputError: the sizes in `spec` allow no buckets, or the picture would have to be enlarged to fill one.
    """
    buckets = predefined_buckets(spec)
    if buckets:
        bucket = _nearest(image_size, buckets)
        resized = _cover(image_size, bucket)
    else:
        step = spec.bucket_reso_steps
        resized = _shrink_to_area(image_size, spec.resolution, step)
        bucket = _floor(resized[0], step), _floor(resized[1], step)
        if 0 in bucket:
            raise InputError(
                f"{_text(image_size)} pixels leave a side shorter than bucket_reso_steps = {step}, and "
                "bucket_no_upscale forbids enlarging: remove the picture, lower bucket_reso_steps or allow enlarging"
            )
    return Placement(bucket, resized, ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2))


def _nearest(size: tuple[int, int], buckets: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The bucket of the nearest ratio of width to height, the first of equals; the picture's own size if it is one."""
    if size in buckets:
        return size
    ratio = size[0] / size[1]
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def _cover(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """`size` scaled, ratio kept, so that one side equals the bucket's and the other is not shorter."""
    wider = size[0] / size[1] > bucket[0] / bucket[1]
    scale = bucket[1] / size[1] if wider else bucket[0] / size[0]
    return _round(size[0] * scale), _round(size[1] * scale)


def _shrink_to_area(size: tuple[int, int], resolution: tuple[int, int], step: int) -> tuple[int, int]:
    """`size`, or if its area is above that of `resolution` a smaller one with one side a multiple of `step`.

    That side is the one which, once the other is cut down too, changes the ratio less.
    """
    area = resolution[0] * resolution[1]
    if size[0] * size[1] <= area:
        return size
    ratio = size[0] / size[1]
    width = _floor(_round(math.sqrt(area * ratio)), step)
    height = _floor(_round(area / math.sqrt(area * ratio)), step)

    def change(bucket: tuple[int, int]) -> float:
        # A side of 0 means a picture thinner than one step, where sd-scripts divides by zero.
        return math.inf if 0 in bucket else abs(bucket[0] / bucket[1] - ratio)

    by_width = change((width, _floor(_round(width / ratio), step)))
    by_height = change((_floor(_round(height * ratio), step), height))
    return (width, _round(width / ratio)) if by_width < by_height else (_round(height * ratio), height)


def _check_step(step: int) -> None:
    if step <= 0 or step % SIDE_MULTIPLE:
        raise InputError(f"bucket_reso_steps = {step}: expected a positive multiple of {SIDE_MULTIPLE}")


def _floor(value: int, step: int) -> int:
    return value - value % step


def _round(value: float) -> int:
    # Halves upwards as sd-scripts rounds, where Python's round() goes to the even neighbour.
    return int(value + 0.5)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"

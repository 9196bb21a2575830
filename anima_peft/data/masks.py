"""Where in a picture the loss counts: from its opacity, or from a mask beside it.

Letters: H, W height and width of a bucket in pixels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ..errors import InputError
from .buckets import VAE_FACTOR, Placement
from .cache import read_unchanged
from .pixels import DECODE_ERRORS, decode_alpha, decode_rgb, fit


@dataclass(frozen=True)
class MaskSource:
    """What a picture's mask is read from."""

    path: Path
    """The picture itself, or the mask's file."""
    sha256: str
    """Of the file's bytes, 64 hex digits."""
    from_alpha: bool
    """Whether the file's opacity is the mask, and not its red channel."""


def masks_of(folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
    """The mask files of a folder by their stem.

    Raises:
        InputError: the folder cannot be read, or two masks have the same stem.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"not a folder that can be read ({error.strerror or error})") from error
    found: dict[str, Path] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in suffixes:
            continue
        if stem in found:
            raise InputError(f"{found[stem].name} and {name} are masks for the same picture; remove one")
        found[stem] = folder / name
    return found


def load_mask(source: MaskSource, placement: Placement, crop: tuple[int, int] | None = None) -> torch.Tensor:
    """The mask of a picture where it is placed, averaged over the pixels of each latent; not mirrored.

    Args:
        source: what it is read from.
        placement: of the picture; a mask of another size is stretched to it.
        crop: (left, top) of the bucket in the resized picture, where it is not the placement's.

    Returns:
        (1, H/8, W/8) float32 in [0, 1]; all ones for a picture without transparency.

    Raises:
        InputError: the file cannot be decoded any more, or its content is not that which was scanned.
    """
    data = read_unchanged(source.path, source.sha256)
    try:
        image = decode_alpha(data) if source.from_alpha else decode_rgb(data)
    except DECODE_ERRORS as error:
        raise InputError(f"{source.path}: cannot read this mask ({error}); replace or remove it") from error
    if image is None:
        return torch.ones(1, placement.bucket[1] // VAE_FACTOR, placement.bucket[0] // VAE_FACTOR)
    if source.from_alpha:
        image = Image.merge("RGB", (image, image, image))
    placed = placement if crop is None else replace(placement, crop=crop)
    # The box filter makes no values beyond those of the mask, where a side grows.
    pixels = fit(image, placed, flip=False, interpolation="area")[:1]
    return torch.nn.functional.avg_pool2d((pixels + 1) / 2, VAE_FACTOR).clamp(0, 1)

"""Pictures that are the same or nearly so, by what they look like."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..terminal import progress_bar
from .pictures import Picture, decode

_HASH_SIDE = 8
# Of 64 that differ: copies of drawn patches, resized or as JPEG, differ in 3 at most, other pictures in 12 or more.
_MOST_BITS = 6
_MOST_DIFFERENCE = 10.0  # of 255, between the means of 8 x 8 areas: flat pictures have like hashes
_BLOCK = 512


@dataclass(frozen=True)
class _Look:
    """What is kept of a picture to compare it by."""

    bits: np.ndarray
    """(64,) bool: whether each of 8 x 8 areas is brighter than its left neighbour (dHash, Krawetz 2013)."""
    colours: np.ndarray
    """(8, 8, 3) int16, the areas' mean colours."""


def near_duplicates(pictures: Sequence[Picture], *, progress: bool = True) -> list[tuple[Path, Path]]:
    """Pairs of files that look alike, whatever their sizes and formats; a file in several datasets counts once.

    Raises:
        InputError: a picture cannot be read any more.
    """
    files = list({picture.path: picture for picture in pictures}.values())
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        looks = list(
            progress_bar(
                pool.map(_look, files), total=len(files), desc="comparing pictures", unit="file", disable=not progress
            )
        )
    # +1 and -1, so that a product of rows counts equal bits less different ones.
    signs = np.stack([look.bits for look in looks]).astype(np.float32) * 2 - 1
    pairs = []
    for start in range(0, len(files), _BLOCK):
        different = (signs.shape[1] - signs[start : start + _BLOCK] @ signs.T) / 2
        for row, column in np.argwhere(different <= _MOST_BITS).tolist():
            one, other = start + row, column
            if one < other and _difference(looks[one], looks[other]) <= _MOST_DIFFERENCE:
                pairs.append((files[one].path, files[other].path))
    return pairs


def _look(picture: Picture) -> _Look:
    image = decode(picture)
    grey = np.asarray(image.convert("L").resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX), dtype=np.int16)
    colours = np.asarray(image.resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.BOX), dtype=np.int16)
    return _Look((grey[:, 1:] > grey[:, :-1]).ravel(), colours)


def _difference(one: _Look, other: _Look) -> float:
    return float(np.abs(one.colours - other.colours).mean())

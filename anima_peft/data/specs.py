"""What a dataset configuration asks for, as plain frozen values. Sizes are pixels, (width, height)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of pictures with their caption files."""

    image_dir: Path
    """Folder whose pictures are used; its subfolders are not searched."""
    num_repeats: int = 1
    """How often each picture is seen in one epoch, at least 1."""
    caption_extension: str = ".txt"
    """Suffix of the caption file that stands beside a picture under the same stem."""
    class_tokens: str | None = None
    """Caption of pictures that have no caption file; None means a warning and an empty caption."""
    flip_aug: bool = False
    """Show the picture mirrored left to right in half of the cases."""


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that share resolution, batch size and buckets."""

    subsets: tuple[SubsetSpec, ...]
    """The folders, in the order in which their pictures are numbered."""
    resolution: tuple[int, int] = (1024, 1024)
    """With buckets, their area; without, the one size of every picture."""
    batch_size: int = 1
    """Pictures in one batch of one process, at least 1."""
    enable_bucket: bool = False
    """Choose for each picture the bucket nearest to its shape."""
    min_bucket_reso: int = 256
    """Shortest side of a bucket."""
    max_bucket_reso: int = 1024
    """Longest side of a bucket."""
    bucket_reso_steps: int = 64
    """Sides of buckets are multiples of this, itself a multiple of 16."""
    bucket_no_upscale: bool = False
    """Never enlarge a picture: buckets follow the pictures' own sizes, up to the area of `resolution`."""

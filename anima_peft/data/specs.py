"""What a dataset configuration asks for, as plain frozen values. Sizes are pixels, (width, height)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CaptionSpec:
    """How the caption of a sample is made from the text that a picture has; the names are sd-scripts'."""

    caption_prefix: str | None = None
    """Text before each caption, with a space between."""
    caption_suffix: str | None = None
    """Text after each caption, with a space between."""
    caption_dropout_rate: float = 0.0
    """Chance that a sample is trained without its caption, in [0, 1]."""
    caption_dropout_every_n_epochs: int = 0
    """Every so many epochs, no sample has a caption; 0 for never."""
    enable_wildcard: bool = False
    """Take one of several captions, and one of the choices in {a|b}; {{ and }} stand for braces."""
    caption_separator: str = ","
    """What stands between tags."""
    shuffle_caption: bool = False
    """Shuffle the tags that are not kept."""
    caption_tag_dropout_rate: float = 0.0
    """Chance for each tag that is not kept to be left out, in [0, 1]."""
    token_warmup_step: int | float = 0
    """Over so many optimizer steps the number of tags grows to all; below 1, a share of the run."""
    token_warmup_min: int = 1
    """How many of the tags that are not kept there are in the first step of the warmup."""
    keep_tokens: int = 0
    """How many tags at the start are kept as they are."""
    keep_tokens_separator: str | None = None
    """What closes the tags that are kept at the start, and opens those at the end; wins over `keep_tokens`."""
    secondary_separator: str | None = None
    """What stands between tags that are shuffled and dropped as one; becomes `caption_separator` in the end."""

    @property
    def varies_tags(self) -> bool:
        """Whether captions are taken apart into tags."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0

    @property
    def drops_captions(self) -> bool:
        """Whether some samples are trained without their caption."""
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0


AS_WRITTEN = CaptionSpec()
"""Captions are used as they stand."""


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of pictures with their caption files, or one metadata file that names pictures and captions."""

    image_dir: Path | None
    """Folder whose pictures are used; its subfolders are not searched. With `metadata_file`, where the file's relative
    paths start; None there if all are absolute."""
    num_repeats: int = 1
    """How often each picture is seen in one epoch, at least 1."""
    caption_extension: str = ".txt"
    """Suffix of the caption file that stands beside a picture under the same stem."""
    class_tokens: str | None = None
    """Caption of pictures that have none; None means a warning and an empty caption."""
    flip_aug: bool = False
    """Show the picture mirrored left to right in half of the cases."""
    color_aug: bool = False
    """Change a picture's hue or gamma a little in a third of the cases."""
    random_crop: bool = False
    """Cut the bucket out of the picture at a random place instead of the middle."""
    is_reg: bool = False
    """A regularisation set: repeated until it is as large as the rest of its dataset."""
    alpha_mask: bool = False
    """Weight the loss by the pictures' opacity."""
    conditioning_data_dir: Path | None = None
    """Folder of masks under the pictures' stems, white where the loss counts; their red channel is used."""
    metadata_file: Path | None = None
    """JSON or JSON Lines file that names the pictures and their captions."""
    captions: CaptionSpec = AS_WRITTEN
    """What becomes of the captions."""


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
    skip_image_resolution: tuple[int, int] | None = None
    """Pictures of this area or less are left out."""
    resize_interpolation: str | None = None
    """Filter for every resize, one of `pixels.INTERPOLATIONS`; None averages areas to shrink, Lanczos to enlarge."""
    validation_split: float = 0.0
    """Share of the pictures that is held out for validation, in [0, 1); at least one, if it is not 0."""
    validation_seed: int = 42
    """Decides which pictures these are, and their noise."""

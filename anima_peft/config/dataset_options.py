"""The options that describe pictures: what a dataset TOML may say, and its fallbacks in the train args."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data.buckets import SIDE_MULTIPLE
from ..data.pixels import INTERPOLATIONS
from ..data.specs import DatasetSpec, SubsetSpec
from ..errors import InputError
from .captions import CaptionKeys
from .options import Needs, option
from .prompts import MAX_SEED
from .reading import as_number, shown

LONGEST_SIDE = 65536  # pixels; beyond any picture, so a slip of the keyboard


def parse_resolution(raw: object) -> tuple[int, int]:
    """(width, height) in pixels from `1024`, `[1024, 768]`, `"1024"` or `"1024,768"`.

    Raises:
        InputError: it is none of these, or a side is out of range.
    """
    if isinstance(raw, str):
        sides = [as_number(side, int) for side in raw.strip(" []()").split(",")]
    else:
        sides = raw if isinstance(raw, list) else [raw]
    whole = [side for side in sides if isinstance(side, int) and SIDE_MULTIPLE <= side <= LONGEST_SIDE]
    if len(whole) != len(sides) or len(whole) not in (1, 2):
        raise InputError(
            f"expected a side or [width, height] in pixels from {SIDE_MULTIPLE} to {LONGEST_SIDE}, got {shown(raw)}"
        )
    return whole[0], whole[-1]


def _with_dot(extension: str) -> str:
    suffix = extension if extension.startswith(".") else f".{extension}"
    if suffix == "." or set(suffix) & set('/\\<>:"|?*'):
        raise InputError(f'expected the suffix of caption files such as ".txt", got {shown(extension)}')
    return suffix


def _check_steps(steps: int) -> None:
    if steps % SIDE_MULTIPLE:
        raise InputError(f"expected a multiple of {SIDE_MULTIPLE}, got {steps}")


_BUCKETED = Needs("enable_bucket", unless=(False,), hint="set enable_bucket = true or remove it")
BOUNDED_BUCKETS = Needs("bucket_no_upscale", unless=(True,))


def _bucket_side(default: int, *needs: Needs, **rules: Any) -> Any:
    """An option in pixels that only buckets heed."""
    return option(default, minimum=SIDE_MULTIPLE, maximum=LONGEST_SIDE, only_with=(_BUCKETED, *needs), **rules)


@dataclass(frozen=True, kw_only=True)
class DatasetKeys:
    """Pictures, where the dataset TOML does not say: size and buckets."""

    resolution: tuple[int, int] = option(
        DatasetSpec.resolution, convert=parse_resolution, help="Training size in pixels: a side, or width,height."
    )
    enable_bucket: bool = option(DatasetSpec.enable_bucket, help="Group pictures by aspect ratio instead of cropping.")
    min_bucket_reso: int = _bucket_side(
        DatasetSpec.min_bucket_reso, BOUNDED_BUCKETS, help="Shortest side of a bucket in pixels."
    )
    max_bucket_reso: int = _bucket_side(
        DatasetSpec.max_bucket_reso, BOUNDED_BUCKETS, help="Longest side of a bucket in pixels."
    )
    bucket_reso_steps: int = _bucket_side(
        DatasetSpec.bucket_reso_steps,
        check=_check_steps,
        help=f"Sides of a bucket are multiples of this; itself a multiple of {SIDE_MULTIPLE}.",
    )
    bucket_no_upscale: bool = option(
        DatasetSpec.bucket_no_upscale, only_with=(_BUCKETED,), help="Never enlarge a picture to fill a bucket."
    )
    skip_image_resolution: tuple[int, int] | None = option(
        DatasetSpec.skip_image_resolution,
        convert=parse_resolution,
        help="Leave out pictures whose area is not larger than this: a side, or width,height.",
    )
    resize_interpolation: str | None = option(
        DatasetSpec.resize_interpolation,
        choices=tuple(INTERPOLATIONS),
        synonyms={"linear": "bilinear", "cubic": "bicubic"},
        help="Filter for every resize. Unset, areas are averaged to shrink a picture, and Lanczos enlarges it.",
    )
    validation_split: float = option(
        DatasetSpec.validation_split,
        minimum=0,
        below=1,
        help="Share of a dataset's pictures that is not trained on, and whose loss is measured; at least one picture.",
    )
    validation_seed: int = option(
        DatasetSpec.validation_seed,
        minimum=0,
        maximum=MAX_SEED,
        only_with=(Needs("validation_split", unless=(0.0,)),),
        help="Decides which pictures are held out, and the noise they are measured with.",
    )


@dataclass(frozen=True, kw_only=True)
class BatchKeys:
    """Pictures: the batch size, which the train args call train_batch_size."""

    batch_size: int = option(DatasetSpec.batch_size, minimum=1, help="Pictures per device and step.")


@dataclass(frozen=True, kw_only=True)
class SubsetKeys(CaptionKeys):
    """Pictures, where the dataset TOML does not say: captions and repeats."""

    num_repeats: int = option(
        SubsetSpec.num_repeats,
        aliases=("dataset_repeats",),
        minimum=1,
        help="How often each picture is seen in an epoch.",
    )
    caption_extension: str = option(
        SubsetSpec.caption_extension,
        aliases=("caption_extention",),  # sd-scripts takes its old misspelling too
        convert=_with_dot,
        only_with=(Needs("metadata_file", values=(None,)),),
        help="Suffix of the caption files.",
    )
    class_tokens: str | None = option(SubsetSpec.class_tokens, help="Caption of a picture that has no caption file.")
    flip_aug: bool = option(SubsetSpec.flip_aug, help="Also train on mirrored pictures.")
    color_aug: bool = option(
        SubsetSpec.color_aug,
        help="Turn the hue or change the gamma of a third of the samples a little. Such pictures pass through the VAE "
        "in every step.",
    )
    random_crop: bool = option(
        SubsetSpec.random_crop,
        help="Crop at a random place instead of the middle. Pictures that are cropped then pass through the VAE in "
        "every step.",
    )
    alpha_mask: bool = option(
        SubsetSpec.alpha_mask,
        only_with=(Needs("conditioning_data_dir", values=(None,), hint="keep one of them"),),
        help="Weight the loss by the pictures' opacity.",
    )


@dataclass(frozen=True, kw_only=True)
class PlaceKeys:
    """Pictures: where they are, in [[datasets.subsets]]."""

    image_dir: str | None = option(
        None, is_path=True, help="Folder of the pictures; with metadata_file, where its relative paths start."
    )
    metadata_file: str | None = option(
        None, is_path=True, help="JSON or JSON Lines file that names pictures and their captions and tags."
    )
    conditioning_data_dir: str | None = option(
        None,
        is_path=True,
        help="Folder of masks under the pictures' names, white where the loss counts; needs masked_loss.",
    )
    is_reg: bool = option(
        SubsetSpec.is_reg,
        help="A regularisation set: repeated to the size of the rest of its dataset, and weighted by "
        "prior_loss_weight.",
    )

"""The pictures of a dataset: found, checked and given their captions and buckets before anything is encoded."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from ..errors import InputError
from ..limited import read_limited
from ..terminal import progress_bar
from .buckets import Placement, place
from .cache import INDEX_NAME, FileFacts, FileIndex, Stamp, cache_folder, file_stamp, read_unchanged
from .finding import Found, find
from .masks import MaskSource
from .pixels import DECODE_ERRORS, MOST_PICTURE_BYTES, decode_rgb, fit, look_over
from .sets import balance, hold_out
from .specs import AS_WRITTEN, CaptionSpec, DatasetSpec
from .variation import Variation, change_colors

_NAMES_IN_A_WARNING = 5
_MASK_RATIO_TOLERANCE = 0.02  # a mask one pixel off in a small picture is no fault

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of one dataset, ready to be encoded."""

    path: Path
    """The file."""
    sha256: str
    """Of the file's bytes, 64 hex digits."""
    size: tuple[int, int]
    """(width, height) in pixels with EXIF rotation applied."""
    caption: str
    """As it is written, may be empty; where one of several is chosen, one a line."""
    num_repeats: int
    """How often it is seen in one epoch."""
    flip_aug: bool
    """Whether it is also seen mirrored."""
    placement: Placement
    """Its bucket and how it gets there."""
    dataset_index: int
    """Which of the scanned datasets it belongs to."""
    batch_size: int
    """Of that dataset."""
    captions: CaptionSpec = AS_WRITTEN
    """How a sample's caption is made from `caption`."""
    is_reg: bool = False
    """Whether it belongs to a regularisation set."""
    color_aug: bool = False
    """Whether its colours vary."""
    random_crop: bool = False
    """Whether the bucket is cut out at random."""
    mask: MaskSource | None = None
    """Where the loss counts; None for everywhere."""
    interpolation: str | None = None
    """Filter for resizing, None for the usual ones."""
    held_out: bool = False
    """Whether it is looked at for validation, and not trained on."""

    @property
    def varies(self) -> bool:
        """Whether its pixels differ from sample to sample by more than mirroring."""
        return self.color_aug or (self.random_crop and self.placement.resized != self.placement.bucket)


def scan(
    datasets: Sequence[DatasetSpec], *, cache_dir: Path | None = None, progress: bool = True
) -> tuple[Picture, ...]:
    """Find the pictures of all subsets, folders in the natural order of their names, and check every one of them.

    New and changed files are read and decoded wholly, so that a damaged one is reported here and not in the middle of
    encoding; what was found is remembered in the cache folder, and unchanged files are not opened. Nothing is written
    if there are faults. Pictures without captions get the subset's class tokens, else "" and one warning. Pictures that
    `skip_image_resolution` leaves out, and regularisation pictures beyond the number of the others, are not returned.

    Args:
        datasets: what to look for.
        cache_dir: the cache folder of all pictures; None means one beside them.
        progress: show a bar while files are read.

    Raises:
        InputError: lists every fault of every subset: folders missing or without pictures, sizes that allow no
            buckets, unreadable pictures, captions and masks, pictures too small for their bucket; or the cache folder
            cannot be written.
    """
    faults: list[str] = []
    found = list(find(datasets, faults))
    indexes = _indexes(found, cache_dir)
    facts = _gather_facts(indexes, faults, progress)
    placement_of = cache(lambda dataset, size: place(size, datasets[dataset]))
    pictures: list[Picture] = []
    small: list[Path] = []
    for file in found:
        known, mask = facts.get(file.path), facts.get(file.mask) if file.mask else None
        if known is None or (file.mask and mask is None):
            continue  # reported already
        if _is_small(known, file.dataset):
            small.append(file.path)
        else:
            pictures += _placed(file, known, mask, placement_of, faults)
    faults += _emptied(datasets, found, pictures, small)
    if faults:
        raise InputError.from_faults("The dataset cannot be used:", dict.fromkeys(faults))
    for index in dict.fromkeys(indexes.values()):
        index.save()
    kept, unused = balance(hold_out(pictures, datasets))
    _report(found, facts, small, unused)
    return tuple(kept)


def decode(picture: Picture) -> Image.Image:
    """A scanned picture in 8-bit RGB as it stands in its file; see `pixels.decode_rgb`.

    Raises:
        InputError: the file cannot be read or decoded any more, or it is not what was scanned or what the cache
            folder's index says of it.
    """
    data = read_unchanged(picture.path, picture.sha256)
    try:
        image = decode_rgb(data)
    except DECODE_ERRORS as error:
        raise InputError(_unreadable(picture.path, error)) from error
    if image.size != picture.size:
        raise InputError(
            f"{picture.path}: has {image.width} x {image.height} pixels, and {INDEX_NAME} in its cache folder says "
            f"{picture.size[0]} x {picture.size[1]}; remove {INDEX_NAME}"
        )
    return image


def load_pixels(picture: Picture, flip: bool, variation: Variation | None = None) -> torch.Tensor:
    """Decode a picture as it is placed in its bucket, mirrored left to right if `flip`.

    EXIF rotation is applied; transparency is dropped (not blended), as sd-scripts does.

    Args:
        picture: from `scan`.
        flip: whether to mirror it, after all else.
        variation: the sample's own crop and colours; None for those that are kept.

    Returns:
        (3, H, W) float32 in [-1, 1], H and W the bucket's.

    Raises:
        InputError: the file cannot be read or decoded any more, or its content is not that which was scanned.
    """
    image = decode(picture)
    placement = picture.placement
    if variation is not None:
        image = change_colors(image, variation)
        placement = replace(placement, crop=variation.crop)
    return fit(image, placement, flip, picture.interpolation)


def _indexes(found: Sequence[Found], cache_dir: Path | None) -> dict[Path, FileIndex]:
    """For each file of pictures and masks the index that knows it; each index is read once."""
    read = cache(FileIndex)

    @cache
    def beside(folder: Path) -> FileIndex:
        return read(cache_folder(folder, cache_dir))

    return {path: beside(file.path.parent) for file in found for path in (file.path, file.mask) if path}


def _report(
    found: Sequence[Found], facts: Mapping[Path, FileFacts], small: Sequence[Path], unused: Sequence[Path]
) -> None:
    """Warn of what is left out or used in part, one sentence for each kind."""
    _warn("%d pictures are left out, because they are not larger than skip_image_resolution: %s", small)
    _warn(
        "%d pictures are animations, of which only the first frame is trained: %s",
        [file.path for file in found if facts[file.path].animated],
    )
    _warn(
        "%d pictures have neither a caption nor class_tokens and are trained with an empty caption: %s",
        [file.path for file in found if file.caption is None],
    )
    _warn(
        "%d pictures have several captions, of which only the first is used; set enable_wildcard to use all: %s",
        [file.path for file in found if file.leaves_lines],
    )
    _warn("%d regularisation pictures are left out, because there are enough without them: %s", unused)


def _gather_facts(indexes: dict[Path, FileIndex], faults: list[str], progress: bool) -> dict[Path, FileFacts]:
    """sha256 and size of each picture, from its index or by decoding it; adds a fault for each that cannot be."""
    facts = {}
    unknown = []
    for path, index in indexes.items():
        known = index.known(path)
        if known is not None and known.picture_size is not None:
            facts[path] = known
        else:
            unknown.append(path)
    # Decoding leaves Python's lock, so threads are enough.
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        bar = progress_bar(
            total=len(unknown),
            desc="checking pictures",
            unit="file",
            leave=False,
            disable=not (progress and unknown),
        )
        with bar:
            for path, outcome in zip(unknown, pool.map(_inspect, unknown), strict=True):
                bar.update()
                if isinstance(outcome, str):
                    faults.append(outcome)
                else:
                    stamp, facts[path] = outcome
                    indexes[path].remember(path, stamp, facts[path])
    finally:
        # On an interrupt, files still in the queue are not waited for.
        pool.shutdown(cancel_futures=True)
    return facts


def _inspect(path: Path) -> tuple[Stamp, FileFacts] | str:
    """Read and decode one file: its facts, with its stamp from before it was read; or its fault."""
    try:
        stamp = file_stamp(path)
        data = read_limited(path, MOST_PICTURE_BYTES)
        look = look_over(data)
        return stamp, FileFacts(hashlib.sha256(data).hexdigest(), look.size, look.animated)
    except DECODE_ERRORS as error:
        return _unreadable(path, error)


def _is_small(facts: FileFacts, dataset: DatasetSpec) -> bool:
    assert facts.picture_size is not None  # known of whatever decodes
    limit = dataset.skip_image_resolution
    return limit is not None and facts.picture_size[0] * facts.picture_size[1] <= limit[0] * limit[1]


def _placed(
    file: Found,
    facts: FileFacts,
    mask: FileFacts | None,
    placement_of: Callable[[int, tuple[int, int]], Placement],
    faults: list[str],
) -> list[Picture]:
    """The picture in its bucket; nothing, and a fault, where it fits none or its mask does not fit it."""
    assert facts.picture_size is not None
    subset = file.subset
    source = None
    try:
        placement = placement_of(file.dataset_index, facts.picture_size)
        if file.mask is not None and mask is not None:
            _require_shape(file.mask, mask, facts.picture_size)
            source = MaskSource(file.mask, mask.sha256, from_alpha=subset.alpha_mask)
    except InputError as error:
        faults.append(f"{file.path}: {error}")
        return []
    picture = Picture(
        path=file.path,
        sha256=facts.sha256,
        size=facts.picture_size,
        caption=file.caption or "",
        num_repeats=subset.num_repeats,
        flip_aug=subset.flip_aug,
        placement=placement,
        dataset_index=file.dataset_index,
        batch_size=file.dataset.batch_size,
        captions=subset.captions,
        is_reg=subset.is_reg,
        color_aug=subset.color_aug,
        random_crop=subset.random_crop,
        mask=source,
        interpolation=file.dataset.resize_interpolation,
    )
    return [picture]


def _require_shape(path: Path, mask: FileFacts, size: tuple[int, int]) -> None:
    """Raises InputError where a mask has another ratio of width to height than its picture."""
    assert mask.picture_size is not None
    width, height = mask.picture_size
    if abs(width * size[1] / (height * size[0]) - 1) > _MASK_RATIO_TOLERANCE:
        raise InputError(
            f"its mask {path} has {width} x {height} pixels, which is another shape than the picture's {size[0]} x "
            f"{size[1]}; make them alike"
        )


def _emptied(
    datasets: Sequence[DatasetSpec], found: Sequence[Found], pictures: Sequence[Picture], small: Sequence[Path]
) -> list[str]:
    """A fault for each dataset of which nothing to train on is left."""
    faults, left_out = [], set(small)
    for index in range(len(datasets)):
        files = [file for file in found if file.dataset_index == index]
        left = [picture for picture in pictures if picture.dataset_index == index]
        if files and all(file.path in left_out for file in files):
            faults.append(f"datasets[{index}]: skip_image_resolution leaves none of its pictures; lower it")
        elif left and all(picture.is_reg for picture in left):
            faults.append(f"datasets[{index}]: only regularisation pictures (is_reg), and nothing to balance them with")
    return faults


def _unreadable(path: Path, error: BaseException) -> str:
    reason: object = error.strerror if isinstance(error, OSError) and error.strerror else error
    if isinstance(error, UnidentifiedImageError):
        reason = "not a picture of a kind that can be read"
    return f"{path}: cannot read this picture ({reason}); replace or remove it"


def _warn(text: str, paths: Sequence[Path]) -> None:
    """One warning with the number of files and the first of them."""
    files = list(dict.fromkeys(paths))
    if files:
        names = ", ".join(str(path) for path in files[:_NAMES_IN_A_WARNING])
        logger.warning(text, len(files), names + (", …" if len(files) > _NAMES_IN_A_WARNING else ""))

"""The pictures of a dataset: found, checked and given their captions and buckets before anything is encoded."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..errors import InputError
from .buckets import Placement, place, predefined_buckets
from .cache import INDEX_NAME, FileFacts, FileIndex, Stamp, cache_folder, file_stamp
from .captions import caption_path, read_caption
from .pixels import DECODE_ERRORS, decode_rgb, fit, picture_size
from .specs import DatasetSpec, SubsetSpec

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_SUFFIXES_OF_PLUGINS = frozenset({".avif", ".jxl"})
_NAMES_IN_A_WARNING = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """One picture of one dataset, ready to be encoded."""

    path: Path
    """The file, in its subset's `image_dir`."""
    sha256: str
    """Of the file's bytes, 64 hex digits."""
    size: tuple[int, int]
    """(width, height) in pixels with EXIF rotation applied."""
    caption: str
    """One line; may be empty."""
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


@dataclass(frozen=True)
class _Found:
    """A picture file before anything is known of its content."""

    path: Path
    dataset_index: int
    dataset: DatasetSpec
    subset: SubsetSpec


def scan(
    datasets: Sequence[DatasetSpec], *, cache_dir: Path | None = None, progress: bool = True
) -> tuple[Picture, ...]:
    """Find the pictures of all folders, in the natural order of their names, and check every one of them.

    New and changed files are read and decoded wholly, so that a damaged one is reported here and not in the middle of
    encoding; what was found is remembered in the cache folder, and unchanged files are not opened. Nothing is written
    if there are faults. Pictures without caption file get the subset's class tokens, else "" and one warning.

    Args:
        datasets: what to look for.
        cache_dir: the cache folder of all pictures; None means one in each `image_dir`.
        progress: show a bar while files are read.

    Raises:
        InputError: lists every fault of every folder: folders missing or without pictures, sizes that allow no
            buckets, unreadable pictures and captions, pictures too small for their bucket; or the cache folder cannot
            be written.
    """
    faults: list[str] = []
    found = list(_find(datasets, faults))
    indexes = {folder: FileIndex(folder) for folder in dict.fromkeys(_index_folder(f, cache_dir) for f in found)}
    facts = _gather_facts({f.path: indexes[_index_folder(f, cache_dir)] for f in found}, faults, progress)
    pictures: list[Picture] = []
    without_caption: list[Path] = []
    for file in found:
        caption = _caption(file, faults)
        if caption is None:
            without_caption.append(file.path)
        if file.path in facts:
            pictures += _placed(file, facts[file.path], caption or "", faults)
    if faults:
        raise InputError.from_faults("The dataset cannot be used:", dict.fromkeys(faults))
    for index in indexes.values():
        index.save()
    _warn_without_caption(list(dict.fromkeys(without_caption)))
    return tuple(pictures)


def load_pixels(picture: Picture, flip: bool) -> torch.Tensor:
    """Decode a picture as it is placed in its bucket, mirrored left to right if `flip`.

    EXIF rotation is applied; transparency is dropped (not blended), as sd-scripts does; shrinking averages areas and
    enlarging uses Lanczos.

    Returns:
        (3, H, W) float32 in [-1, 1], H and W the bucket's.

    Raises:
        InputError: the file cannot be read or decoded any more, or its content is not that which was scanned.
    """
    try:
        data = picture.path.read_bytes()
        image = decode_rgb(data)
    except DECODE_ERRORS as error:
        raise InputError(_unreadable(picture.path, error)) from error
    # Caching takes long: a picture edited meanwhile must not be kept under the name of what it was before.
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise InputError(
            f"{picture.path}: this picture changed after it was checked; start anew, and if that does not help, "
            f"remove {INDEX_NAME} from its cache folder"
        )
    return fit(image, picture.placement, flip)


def _find(datasets: Sequence[DatasetSpec], faults: list[str]) -> Iterator[_Found]:
    """Every picture file of every usable folder; adds a fault for each unusable one."""
    suffixes = _SUFFIXES | (_SUFFIXES_OF_PLUGINS & Image.registered_extensions().keys())
    for dataset_index, dataset in enumerate(datasets):
        where = f"datasets[{dataset_index}]"
        has_buckets = True
        try:
            predefined_buckets(dataset)
        except InputError as error:
            faults.append(f"{where}: {error}")
            has_buckets = False
        for subset_index, subset in enumerate(dataset.subsets):
            name = f"{where}.subsets[{subset_index}].image_dir = {str(subset.image_dir)!r}"
            try:
                with os.scandir(subset.image_dir) as entries:
                    names = [entry.name for entry in entries if entry.is_file()]
            except OSError as error:
                faults.append(f"{name}: not a folder that can be read ({error.strerror or error})")
                continue
            names = [n for n in names if not n.startswith(".") and os.path.splitext(n)[1].lower() in suffixes]
            if not names:
                known = ", ".join(sorted(suffix.removeprefix(".") for suffix in suffixes))
                faults.append(f"{name}: no pictures in this folder ({known}; subfolders are not searched)")
            # Without buckets every picture would only repeat that fault.
            for file_name in sorted(names, key=_natural) if has_buckets else ():
                yield _Found(subset.image_dir / file_name, dataset_index, dataset, subset)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sorting key by which 2.png comes before 10.png, the same on every system."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if part.isdecimal() else part for part in parts], name


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
        bar = tqdm(total=len(unknown), desc="checking pictures", unit="file", disable=not (progress and unknown))
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
        data = path.read_bytes()
        return stamp, FileFacts(hashlib.sha256(data).hexdigest(), picture_size(data))
    except DECODE_ERRORS as error:
        return _unreadable(path, error)


def _caption(file: _Found, faults: list[str]) -> str | None:
    """The caption, the subset's class tokens where there is no caption file, or None for neither."""
    try:
        caption = read_caption(caption_path(file.path, file.subset.caption_extension))
    except InputError as error:
        faults.append(str(error))
        return ""
    return file.subset.class_tokens if caption is None else caption


def _placed(file: _Found, facts: FileFacts, caption: str, faults: list[str]) -> list[Picture]:
    """The picture in its bucket; nothing, and a fault, where it fits none."""
    assert facts.picture_size is not None  # known of whatever decodes
    try:
        placement = place(facts.picture_size, file.dataset)
    except InputError as error:
        faults.append(f"{file.path}: {error}")
        return []
    picture = Picture(
        path=file.path,
        sha256=facts.sha256,
        size=facts.picture_size,
        caption=caption,
        num_repeats=file.subset.num_repeats,
        flip_aug=file.subset.flip_aug,
        placement=placement,
        dataset_index=file.dataset_index,
        batch_size=file.dataset.batch_size,
    )
    return [picture]


def _index_folder(file: _Found, cache_dir: Path | None) -> Path:
    return cache_folder(file.subset.image_dir, cache_dir)


def _unreadable(path: Path, error: BaseException) -> str:
    reason = "not a picture that can be read" if isinstance(error, UnidentifiedImageError) else error
    return f"{path}: cannot read this picture ({reason}); replace or remove it"


def _warn_without_caption(paths: list[Path]) -> None:
    if paths:
        names = ", ".join(str(path) for path in paths[:_NAMES_IN_A_WARNING])
        more = ", …" if len(paths) > _NAMES_IN_A_WARNING else ""
        logger.warning(
            "%d pictures have neither a caption file nor class_tokens and are trained with an empty caption: %s%s",
            len(paths),
            names,
            more,
        )

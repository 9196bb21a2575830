"""The picture files that a dataset's folders and metadata files name, with their captions and masks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import InputError
from .buckets import predefined_buckets
from .captions import MetadataEntry, caption_path, read_caption, read_metadata
from .masks import masks_of
from .specs import DatasetSpec, SubsetSpec

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_SUFFIXES_OF_PLUGINS = frozenset({".avif", ".jxl"})


@dataclass(frozen=True, slots=True)
class Found:
    """A picture file before anything is known of its content."""

    path: Path
    dataset_index: int
    dataset: DatasetSpec
    subset: SubsetSpec
    caption: str | None
    """Its captions, one a line; None where it has neither captions nor the subset's class tokens."""
    mask: Path | None
    """The file of its mask, which may be the picture itself."""
    leaves_lines: bool = False
    """Whether it has further captions, which are not used."""


def find(datasets: Sequence[DatasetSpec], faults: list[str]) -> Iterator[Found]:
    """Every picture file of every usable subset; adds a fault for whatever is not usable."""
    for dataset_index, dataset in enumerate(datasets):
        where = f"datasets[{dataset_index}]"
        has_buckets = True
        try:
            predefined_buckets(dataset)
        except InputError as error:
            faults.append(f"{where}: {error}")
            has_buckets = False
        for subset_index, subset in enumerate(dataset.subsets):
            name = f"{where}.subsets[{subset_index}]"
            masks = _masks(subset, name, faults)
            for path, entry in _files(subset, name, faults):
                if not has_buckets:  # every picture would only repeat that fault
                    continue
                mask = _mask(path, subset, masks, faults)
                caption = _caption(path, entry, subset, faults)
                used = caption if caption is None or subset.captions.enable_wildcard else caption.split("\n")[0]
                yield Found(path, dataset_index, dataset, subset, used, mask, leaves_lines=used != caption)


def picture_suffixes() -> frozenset[str]:
    """The suffixes of pictures that can be read here, in lower case."""
    return _SUFFIXES | (_SUFFIXES_OF_PLUGINS & Image.registered_extensions().keys())


def _files(subset: SubsetSpec, where: str, faults: list[str]) -> Iterator[tuple[Path, MetadataEntry | None]]:
    """Picture files in their order, with their entries in the metadata file if there is one.

    What has a picture's name is taken for one, and is a fault where it turns out to be a folder, a pipe or a link to
    nothing. A link to a picture is followed: that is how sets share them, and how hubs' caches keep them.
    """
    if subset.metadata_file is not None:
        yield from _named_files(subset, f"{where}.metadata_file", faults)
        return
    assert subset.image_dir is not None
    name = f"{where}.image_dir = {str(subset.image_dir)!r}"
    try:
        names = _pictures_in(subset.image_dir)
    except OSError as error:
        faults.append(f"{name}: not a folder that can be read ({error.strerror or error})")
        return
    if not names:
        known = ", ".join(sorted(suffix.removeprefix(".") for suffix in picture_suffixes()))
        faults.append(f"{name}: no pictures in this folder ({known}; subfolders are not searched)")
    yield from ((subset.image_dir / file, None) for file in names)


def _named_files(subset: SubsetSpec, where: str, faults: list[str]) -> Iterator[tuple[Path, MetadataEntry]]:
    """The pictures that a metadata file names, with suffix or without, in its order."""
    assert subset.metadata_file is not None
    try:
        entries = read_metadata(subset.metadata_file)
    except InputError as error:
        faults.append(f"{where}: {error}")
        return
    seen: dict[Path, str] = {}
    for entry in entries:
        if subset.image_dir is None and not Path(entry.path).is_absolute():
            faults.append(f"{where}: {entry.path!r} is a relative path; set image_dir, the folder where it starts")
            continue
        if subset.image_dir is not None and not _is_inside(entry.path, subset.image_dir):
            faults.append(f"{where}: {entry.path!r} is outside of image_dir = {str(subset.image_dir)!r}; move it there")
            continue
        path = _with_suffix(Path(subset.image_dir or "") / entry.path)
        if path is None:
            faults.append(f"{where}: there is no picture {str(Path(subset.image_dir or '') / entry.path)!r}")
        elif path in seen:
            faults.append(f"{where}: {seen[path]!r} and {entry.path!r} are the same picture; remove one")
        else:
            seen[path] = entry.path
            yield path, entry


def _is_inside(path: str, folder: Path) -> bool:
    """Whether a file's path, relative to the folder or absolute, stays in the folder."""
    places = ((folder.absolute(), os.path.abspath), (folder, os.path.realpath))  # as written, or wherever links lead
    return any(Path(place(base / path)).is_relative_to(place(base)) for base, place in places)


def _with_suffix(path: Path) -> Path | None:
    """The picture under this path, or the first with this path and a picture's suffix."""
    # Not the methods of Path, which fail over names that are too long.
    if path.suffix.lower() in picture_suffixes() and os.path.isfile(path):
        return path
    names = _pictures_in(path.parent) if os.path.isdir(path.parent) else []
    return next((path.parent / name for name in names if name.rpartition(".")[0] in (path.name, path.stem)), None)


def _pictures_in(folder: Path) -> list[str]:
    """Names of pictures in natural order.

    Raises:
        OSError: the folder cannot be read.
    """
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    return sorted((name for name in names if os.path.splitext(name)[1].lower() in picture_suffixes()), key=_natural)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sorting key by which 2.png comes before 10.png, the same on every system."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if part.isdecimal() else part for part in parts], name


def _caption(path: Path, entry: MetadataEntry | None, subset: SubsetSpec, faults: list[str]) -> str | None:
    """All captions, the subset's class tokens where there are none, or None for neither."""
    if entry is not None:
        text = entry.text(subset.captions)
    else:
        try:
            text = read_caption(caption_path(path, subset.caption_extension))
        except InputError as error:
            faults.append(str(error))
            return ""
    return subset.class_tokens if text is None else text


def _masks(subset: SubsetSpec, where: str, faults: list[str]) -> dict[str, Path] | None:
    """The masks of a subset by stem; None where its folder is not usable or there is none."""
    if subset.conditioning_data_dir is None:
        return None
    try:
        return masks_of(subset.conditioning_data_dir, picture_suffixes())
    except InputError as error:
        faults.append(f"{where}.conditioning_data_dir = {str(subset.conditioning_data_dir)!r}: {error}")
        return None


def _mask(path: Path, subset: SubsetSpec, masks: dict[str, Path] | None, faults: list[str]) -> Path | None:
    if subset.alpha_mask:
        return path
    if masks is None:
        return None
    if path.stem not in masks:
        faults.append(f"{path}: no mask under this name in {subset.conditioning_data_dir}")
    return masks.get(path.stem)

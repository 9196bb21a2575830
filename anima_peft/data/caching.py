"""Encoding what the cache lacks, and nothing else.

A plan says first what is missing, so that a run whose cache is complete never loads the encoders:

    plan = plan_latents(pictures, model=fingerprint_of_the_vae)
    if plan.missing:
        plan.encode(encode_with_the_vae, batch_size=4)
    plan.files

Letters: B pictures in a batch, C latent channels, H and W height and width of a bucket in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from ..errors import InputError
from .cache import TensorCache, cache_folder, cache_key, require_writable
from .pictures import Picture, load_pixels

# Raise one when the way from a source to its entry changes: decoding, resizing, what is stored.
LATENTS_FORMAT = 1
TEXT_FORMAT = 1
VAE_FACTOR = 8
# Which of a picture's caption variants an entry holds; there is one, the caption as it stands.
_VARIANT = 0

LatentEncoder = Callable[[torch.Tensor], torch.Tensor]
"""Pixels (B, 3, H, W) float32 in [-1, 1], on the CPU -> normalised latents (B, C, H/8, W/8)."""
CaptionEncoder = Callable[[list[str]], Sequence[Mapping[str, torch.Tensor]]]
"""Captions -> for each its named tensors, without rows of padding."""

Source = TypeVar("Source")
File = TypeVar("File")


@dataclass(frozen=True)
class LatentFiles:
    """The cache files of one picture; each holds `latents` (C, H/8, W/8) float32."""

    plain: Path
    flipped: Path | None
    """Of the mirrored picture; None where it is not wanted."""


@dataclass(frozen=True)
class _Missing(Generic[Source]):
    """An entry that has to be made, and what from."""

    cache: TensorCache
    key: str
    source: Source


class _Wanted(Generic[Source]):
    """Collects the entries that a run needs; equal ones are made once, wherever they are wanted."""

    def __init__(self) -> None:
        self.missing: list[_Missing[Source]] = []
        self._paths: dict[str, Path] = {}

    def add(self, cache: TensorCache, key: str, source: Source) -> Path:
        """The file where the entry is or will be."""
        if key not in self._paths:
            self._paths[key] = cache.path(key)
            if not cache.contains(key):
                self.missing.append(_Missing(cache, key, source))
        return self._paths[key]


class _Plan(Generic[File, Source]):
    """The cache files of each picture, and which of them do not exist yet."""

    def __init__(self, files: Sequence[File], missing: list[_Missing[Source]]) -> None:
        self.files = tuple(files)
        self._missing = missing
        # Now, and not after the encoders were loaded, which takes long.
        for folder in dict.fromkeys(item.cache.folder for item in missing):
            require_writable(folder)

    @property
    def missing(self) -> int:
        """How many entries have to be encoded."""
        return len(self._missing)

    def _fill(
        self,
        make: Callable[[list[Source]], Sequence[Mapping[str, torch.Tensor]]],
        batch_size: int,
        group: Callable[[Source], Hashable],
        name: Callable[[Source], str],
        bar: tqdm,
    ) -> None:
        """Make and write the missing entries in their order; a batch holds one `group` only."""
        missing = self._missing
        with bar:
            while missing:
                _, alike = next(groupby(missing[:batch_size], key=lambda item: group(item.source)))
                batch = list(alike)
                for item, tensors in zip(batch, make([item.source for item in batch]), strict=True):
                    if not all(tensor.isfinite().all() for tensor in tensors.values()):
                        raise InputError(f"{name(item.source)}: encoding gives infinities or NaNs; try a wider dtype")
                    item.cache.write(item.key, tensors)
                del missing[: len(batch)]
                bar.update(len(batch))


class LatentsPlan(_Plan[LatentFiles, tuple[Picture, bool]]):
    """Which latents a run needs: `files` for each picture in the order given, and how many are `missing`."""

    def encode(self, encode: LatentEncoder, *, batch_size: int = 1, progress: bool = True) -> None:
        """Make the missing latents, in batches of one bucket.

        Each entry is kept as soon as its batch is encoded: after an interruption, a new plan goes on from there.

        Raises:
            InputError: a picture cannot be decoded any more, its latents are not finite, or the cache cannot be
                written.
        """

        def make(sources: list[tuple[Picture, bool]]) -> list[dict[str, torch.Tensor]]:
            pixels = torch.stack([load_pixels(picture, flip) for picture, flip in sources])
            latents = encode(pixels)
            batch, _, height, width = pixels.shape
            expected = (batch, latents.shape[1], height // VAE_FACTOR, width // VAE_FACTOR)
            assert latents.shape == expected, f"{tuple(latents.shape)} instead of {expected}"
            return [{"latents": row} for row in latents.float().cpu()]

        self._missing.sort(key=lambda item: item.source[0].placement.bucket)
        self._fill(
            make,
            batch_size,
            group=lambda source: source[0].placement.bucket,
            name=lambda source: str(source[0].path),
            bar=_bar("caching latents", "picture", self.missing, progress),
        )


class CaptionsPlan(_Plan[Path, str]):
    """Which captions a run needs encoded: `files` for each picture in the order given, and how many are `missing`."""

    def encode(self, encode: CaptionEncoder, *, batch_size: int = 1, progress: bool = True) -> None:
        """Make the missing encodings; a caption that several pictures share is encoded once.

        Each entry is kept as soon as its batch is encoded: after an interruption, a new plan goes on from there.

        Raises:
            InputError: an encoding is not finite, or the cache cannot be written.
        """
        # Captions of like length together, the longest first: little padding, and memory that runs out does so soon.
        self._missing.sort(key=lambda item: -len(item.source))
        self._fill(
            encode,
            batch_size,
            group=lambda caption: None,
            name=lambda caption: f"caption {caption!r}",
            bar=_bar("caching captions", "caption", self.missing, progress),
        )


def plan_latents(pictures: Sequence[Picture], *, model: str, cache_dir: Path | None = None) -> LatentsPlan:
    """Look up the latents of each picture, and of its mirror image where `flip_aug` wants it.

    Args:
        pictures: from `scan`.
        model: fingerprint of everything in the VAE that decides its output: weights, dtype.
        cache_dir: the cache folder of all pictures; None means one beside the pictures.

    Raises:
        InputError: something is missing and the cache folder cannot be written.
    """
    wanted: _Wanted[tuple[Picture, bool]] = _Wanted()

    def add(picture: Picture, flip: bool) -> Path:
        cache = TensorCache(cache_folder(picture.path.parent, cache_dir), "latents")
        key = cache_key(
            format=LATENTS_FORMAT,
            model=model,
            picture=picture.sha256,
            bucket=picture.placement.bucket,
            resized=picture.placement.resized,
            crop=picture.placement.crop,
            flip=flip,
        )
        return wanted.add(cache, key, (picture, flip))

    files = [LatentFiles(add(picture, False), add(picture, True) if picture.flip_aug else None) for picture in pictures]
    return LatentsPlan(files, wanted.missing)


def plan_captions(
    pictures: Sequence[Picture], *, model: str, options: Mapping[str, Any], cache_dir: Path | None = None
) -> CaptionsPlan:
    """Look up the encoded caption of each picture.

    Args:
        pictures: from `scan`.
        model: fingerprint of everything in the text models that decides their output: weights, tokenizers.
        options: what else decides it, of JSON's types: longest length, dtype, which tensors are kept.
        cache_dir: the cache folder of all pictures; None means one beside the pictures.

    Raises:
        InputError: something is missing and the cache folder cannot be written.
    """
    wanted: _Wanted[str] = _Wanted()
    files = []
    for picture in pictures:
        cache = TensorCache(cache_folder(picture.path.parent, cache_dir), "text")
        key = cache_key(
            format=TEXT_FORMAT, model=model, options=dict(options), caption=picture.caption, variant=_VARIANT
        )
        files.append(wanted.add(cache, key, picture.caption))
    return CaptionsPlan(files, wanted.missing)


def _bar(description: str, unit: str, total: int, progress: bool) -> tqdm:
    return tqdm(total=total, desc=description, unit=unit, disable=not (progress and total))

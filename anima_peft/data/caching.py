"""Encoding what the cache lacks, and nothing else.

A plan says first what is missing, so that a run whose cache is complete never loads the encoders:

    plan = plan_latents(pictures, model=fingerprint_of_the_vae)
    if plan.missing:
        plan.encode(encode_with_the_vae, batch_size=4)
    plan.files

Letters: B pictures in a batch, C latent channels, H and W height and width of a bucket in pixels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from tqdm import tqdm

from ..errors import InputError
from ..files import require_writable
from ..terminal import progress_bar
from .buckets import VAE_FACTOR
from .cache import TensorCache, cache_folder, cache_key
from .masks import MaskSource, load_mask
from .pictures import Picture, load_pixels

# Raise one when the way from a source to its entry changes: decoding, resizing, what is stored.
LATENTS_FORMAT = 1
TEXT_FORMAT = 1
MASK_FORMAT = 1
_VARIANT = 0  # part of the keys of text since a caption had one encoding only
_THREADS = min(8, os.cpu_count() or 1)
# Pictures, and at least two batches: a graphics card encodes several while one thread decodes one.
_DECODED_AHEAD = 2 * _THREADS

LatentEncoder = Callable[[torch.Tensor], torch.Tensor]
"""Pixels (B, 3, H, W) float32 in [-1, 1], on the CPU -> normalised latents (B, C, H/8, W/8)."""
CaptionEncoder = Callable[[list[str]], Sequence[Mapping[str, torch.Tensor]]]
"""Captions -> for each its named tensors, without rows of padding."""

Source = TypeVar("Source")
File = TypeVar("File")


@dataclass(frozen=True, slots=True)
class LatentFiles:
    """The paths of one picture's cache files; each holds `latents` (C, H/8, W/8) float32."""

    plain: str
    flipped: str | None
    """Of the mirrored picture; None where it is not wanted."""


@dataclass(frozen=True)
class _Latent:
    """What one entry of latents is made from."""

    picture: Picture
    flip: bool

    @property
    def bucket(self) -> tuple[int, int]:
        return self.picture.placement.bucket


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
        self._paths: dict[str, str] = {}

    def add(self, cache: TensorCache, key: str, source: Source) -> str:
        """Note that a run needs the entry `key`, to be made from `source` where it is missing; returns its path."""
        if key not in self._paths:
            self._paths[key] = cache.file(key)
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
            require_writable("cache_dir", folder)

    @property
    def missing(self) -> int:
        """How many entries have to be encoded."""
        return len(self._missing)

    def share(self, index: int, count: int) -> Self:
        """A plan that leaves to others what is not in this one of `count` equal shares."""
        part = copy(self)
        part._missing = self._missing[index::count]
        return part

    def look_again(self) -> None:
        """Drop from what is missing what others have made meanwhile."""
        self._missing = [item for item in self._missing if not item.cache.contains(item.key)]

    def _batches(self, batch_size: int, group: Callable[[Source], Hashable]) -> list[list[_Missing[Source]]]:
        """The missing entries in their order; a batch holds one `group` only."""
        batches = []
        for _, alike in groupby(self._missing, key=lambda item: group(item.source)):
            members = list(alike)
            batches += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
        return batches

    def _fill(
        self,
        made: Iterable[tuple[list[_Missing[Source]], Sequence[Mapping[str, torch.Tensor]]]],
        name: Callable[[Source], str],
        bar: tqdm,
    ) -> None:
        """Write entries as they are made, batch by batch; threads write some while the next are made."""
        writing: deque[tuple[_Missing[Source], Future[Path]]] = deque()

        def finish(most: int = 0) -> None:
            while len(writing) > most:
                item, future = writing.popleft()
                future.result()
                self._missing.remove(item)
                bar.update()

        with bar, ThreadPoolExecutor(max_workers=_THREADS) as pool:
            try:
                for batch, entries in made:
                    ready = [{key: tensor.cpu() for key, tensor in tensors.items()} for tensors in entries]
                    for item, tensors in zip(batch, ready, strict=True):
                        if not all(tensor.isfinite().all() for tensor in tensors.values()):
                            raise InputError(
                                f"{name(item.source)}: encoding gives infinities or NaNs; try a wider dtype"
                            )
                    finish(_THREADS)
                    writing += [
                        (item, pool.submit(item.cache.write, item.key, tensors))
                        for item, tensors in zip(batch, ready, strict=True)
                    ]
            finally:
                finish()


class LatentsPlan(_Plan[LatentFiles | None, _Latent]):
    """Which latents a run needs: `files` for each picture in the order given, and how many are `missing`."""

    def encode(self, encode: LatentEncoder, *, batch_size: int = 1, progress: bool = True) -> None:
        """Make the missing latents, in batches of one bucket; threads decode the pictures of the next ones meanwhile.

        Each entry is kept as soon as its batch is encoded: after an interruption, a new plan goes on from there.

        Raises:
            InputError: a picture cannot be decoded any more, its latents are not finite, or the cache cannot be
                written.
        """

        def latents_of(pixels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
            latents = encode(pixels)
            batch, _, height, width = pixels.shape
            expected = (batch, latents.shape[1], height // VAE_FACTOR, width // VAE_FACTOR)
            assert latents.shape == expected, f"{tuple(latents.shape)} instead of {expected}"
            return [{"latents": row} for row in latents.float().cpu()]

        self._missing.sort(key=lambda item: item.source.bucket)
        batches = self._batches(batch_size, lambda source: source.bucket)
        # Threads, and not processes: decoding and resizing leave Python's lock, and nothing has to be pickled.
        pool = ThreadPoolExecutor(max_workers=_THREADS)
        try:
            self._fill(
                ((batch, latents_of(torch.stack(rows))) for batch, rows in _decoded_ahead(batches, pool)),
                name=lambda source: str(source.picture.path),
                bar=_bar("caching latents", "picture", self.missing, progress),
            )
        finally:
            pool.shutdown(cancel_futures=True)


def _decoded_ahead(
    batches: Iterable[list[_Missing[_Latent]]], pool: ThreadPoolExecutor
) -> Iterator[tuple[list[_Missing[_Latent]], list[torch.Tensor]]]:
    """Each batch with its pictures' pixels, while those of the next batches are decoded."""
    queue: deque[tuple[list[_Missing[_Latent]], list[Future[torch.Tensor]]]] = deque()
    for batch in batches:
        queue.append((batch, [pool.submit(load_pixels, item.source.picture, item.source.flip) for item in batch]))
        if len(queue) > max(2, _DECODED_AHEAD // len(batch)):
            ready, futures = queue.popleft()
            yield ready, [future.result() for future in futures]
    for ready, futures in queue:
        yield ready, [future.result() for future in futures]


class MasksPlan(_Plan[str | None, Picture]):
    """Which masks a run needs: `files` for each picture in the order given, None for one without."""

    def encode(self, *, progress: bool = True) -> None:
        """Make the missing masks; each entry holds `mask` (1, H/8, W/8) float32, not mirrored.

        Raises:
            InputError: a mask cannot be decoded any more, or the cache cannot be written.
        """

        def made() -> Iterator[tuple[list[_Missing[Picture]], list[dict[str, torch.Tensor]]]]:
            for item in list(self._missing):
                source = item.source.mask
                assert source is not None
                yield [item], [{"mask": load_mask(source, item.source.placement)}]

        self._fill(
            made(),
            name=lambda picture: str(picture.path),
            bar=_bar("caching masks", "mask", self.missing, progress),
        )


class CaptionsPlan(_Plan[str, str]):
    """Which captions a run needs encoded: `of_caption`, the file of each, and how many are `missing`."""

    def __init__(self, of_caption: Mapping[str, str], missing: list[_Missing[str]]) -> None:
        super().__init__(tuple(of_caption.values()), missing)
        self.of_caption = dict(of_caption)

    def encode(self, encode: CaptionEncoder, *, batch_size: int = 1, progress: bool = True) -> None:
        """Make the missing encodings; a caption that several pictures share is encoded once.

        Each entry is kept as soon as its batch is encoded: after an interruption, a new plan goes on from there.

        Raises:
            InputError: an encoding is not finite, or the cache cannot be written.
        """
        # Captions of like length together, the longest first: little padding, and memory that runs out does so soon.
        self._missing.sort(key=lambda item: -len(item.source))
        batches = self._batches(batch_size, lambda caption: None)
        self._fill(
            ((batch, encode([item.source for item in batch])) for batch in batches),
            name=lambda caption: f"caption {caption!r}",
            bar=_bar("caching captions", "caption", self.missing, progress),
        )


def plan_latents(pictures: Sequence[Picture], *, model: str, cache_dir: Path | None = None) -> LatentsPlan:
    """Look up the latents of each picture, and of its mirror image where `flip_aug` wants it.

    A picture that varies from sample to sample has none (None).

    Args:
        pictures: from `scan`.
        model: fingerprint of everything in the VAE that decides its output: weights, dtype.
        cache_dir: the cache folder of all pictures; None means one beside the pictures.

    Raises:
        InputError: something is missing and the cache folder cannot be written.
    """
    wanted: _Wanted[_Latent] = _Wanted()
    cache_of = _caches("latents", cache_dir)

    def add(picture: Picture, flip: bool) -> str:
        """The path of a picture's latents; its key is made of all that decides them."""
        # Only where it is set, so that entries from before it could be set are found.
        filter_of_resize = {} if picture.interpolation is None else {"interpolation": picture.interpolation}
        key = cache_key(
            format=LATENTS_FORMAT,
            model=model,
            picture=picture.sha256,
            bucket=picture.placement.bucket,
            resized=picture.placement.resized,
            crop=picture.placement.crop,
            flip=flip,
            **filter_of_resize,
        )
        return wanted.add(cache_of(picture.path.parent), key, _Latent(picture, flip))

    def files_of(picture: Picture) -> LatentFiles | None:
        if picture.varies:
            return None
        return LatentFiles(add(picture, False), add(picture, True) if picture.flip_aug else None)

    return LatentsPlan([files_of(picture) for picture in pictures], wanted.missing)


def plan_masks(pictures: Sequence[Picture], *, cache_dir: Path | None = None) -> MasksPlan:
    """Look up the mask of each picture that has one; a picture cut out at random has no kept one (None).

    Raises:
        InputError: something is missing and the cache folder cannot be written.
    """
    wanted: _Wanted[Picture] = _Wanted()
    cache_of = _caches("masks", cache_dir)

    def add(picture: Picture, mask: MaskSource) -> str:
        """The path of a picture's mask; its key is made of all that decides it."""
        key = cache_key(
            format=MASK_FORMAT,
            mask=mask.sha256,
            from_alpha=mask.from_alpha,
            bucket=picture.placement.bucket,
            resized=picture.placement.resized,
            crop=picture.placement.crop,
        )
        return wanted.add(cache_of(picture.path.parent), key, picture)

    kept = [picture.mask if not picture.varies else None for picture in pictures]
    return MasksPlan(
        [add(picture, mask) if mask else None for picture, mask in zip(pictures, kept, strict=True)], wanted.missing
    )


def plan_captions(
    captions: Iterable[tuple[Picture, str]],
    *,
    model: str,
    options: Mapping[str, Any],
    cache_dir: Path | None = None,
) -> CaptionsPlan:
    """Look up encoded captions.

    Args:
        captions: all that are needed, each with a picture beside which it may be kept.
        model: fingerprint of everything in the text models that decides their output: weights, tokenizers.
        options: what else decides it, of JSON's types: longest length, dtype, which tensors are kept.
        cache_dir: the cache folder of all pictures; None means one beside the pictures.

    Raises:
        InputError: something is missing and the cache folder cannot be written.
    """
    wanted: _Wanted[str] = _Wanted()
    cache_of = _caches("text", cache_dir)
    files: dict[str, str] = {}
    for picture, caption in captions:
        if caption not in files:
            key = cache_key(format=TEXT_FORMAT, model=model, options=dict(options), caption=caption, variant=_VARIANT)
            files[caption] = wanted.add(cache_of(picture.path.parent), key, caption)
    return CaptionsPlan(files, wanted.missing)


def _caches(kind: str, cache_dir: Path | None) -> Callable[[Path], TensorCache]:
    """From a folder of pictures to its cache; each is built once."""
    return cache(lambda image_dir: TensorCache(cache_folder(image_dir, cache_dir), kind))


def _bar(description: str, unit: str, total: int, progress: bool) -> tqdm:
    return progress_bar(total=total, desc=description, unit=unit, leave=False, disable=not (progress and total))

"""Encoding pictures and captions into the cache, against the encoder alone and against one thing after the other."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from anima_peft.data import DatasetSpec, Picture, SubsetSpec, load_pixels, plan_captions, plan_latents, scan
from anima_peft.miniature import write_random_miniature
from anima_peft.models.latents import encode_latents
from anima_peft.models.sources import ModelSources
from anima_peft.training import encoding

from . import models
from .measure import PeakMemory, median_ratio, synchronize
from .reporting import Row

_SOURCES = ((768, 512), (512, 768), (600, 600))  # pixels, times two at full size
_WORDS = 40


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--pictures`, `--captions` and `--batch`."""
    parser.add_argument("--pictures", type=int, help="default: 48, or 8 at miniature size")
    parser.add_argument("--captions", type=int, help="default: 512, or 48 at miniature size")
    parser.add_argument("--batch", type=int, default=1, help="pictures in a batch (default: 1)")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of latents and of captions; a ratio is the whole time over that inside of the encoder alone."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _latents(arguments, Path(folder))
        yield from _captions(arguments, Path(folder))


class _Timed:
    """An encoder that knows how long it was at work."""

    def __init__(self, encode: Callable[[Any], Any], device: torch.device) -> None:
        self._encode, self._device, self.seconds = encode, device, 0.0

    def __call__(self, given: Any) -> Any:
        synchronize(self._device)
        start = time.perf_counter()
        result = self._encode(given)
        synchronize(self._device)
        self.seconds += time.perf_counter() - start
        return result


def _latents(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    full, device = arguments.size == "full", arguments.device
    side = 1024 if full else 128
    pictures = _pictures(folder / "pictures", arguments.pictures or (48 if full else 8), 2 if full else 1, side)
    model = models.vae(arguments.size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    batch = arguments.batch

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return encode_latents(model, pixels.to(device))

    ready = [load_pixels(picture, flip=False) for picture in pictures]

    def alone(timed: _Timed) -> None:
        for start in range(0, len(ready), batch):
            alike = ready[start : start + batch]
            timed(torch.stack(alike) if len({pixels.shape for pixels in alike}) == 1 else alike[0][None])

    def in_turn(timed: _Timed) -> None:
        plan = plan_latents(pictures, model="in turn")
        for item in plan._missing:  # what a plan does, without threads
            item.cache.write(item.key, {"latents": timed(load_pixels(item.source.picture, False)[None])[0].cpu()})

    def ours(timed: _Timed) -> None:
        plan_latents(pictures, model="ours").encode(timed, batch_size=batch, progress=False)

    candidates = {"encoder alone": alone, "in turn": in_turn, "ours": ours}
    case = f"latents of {len(pictures)} pictures at {side} x {side}, batches of {batch}"
    yield from _measured(case, candidates, encode, len(pictures), "pictures/s", folder, arguments)


def _captions(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    full, device = arguments.size == "full", arguments.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    files = write_random_miniature(folder / "model")
    sources = ModelSources(files.transformer, files.vae, files.text_encoder, files.tokenizer, files.t5_tokenizer)
    text_model = models.transformer_model(arguments.size, device, dtype)
    text = encoding.TextModels(sources, text_model, "", dtype, device, max_length=512, train_conditioner=False)
    qwen = models.text_encoder(arguments.size, device, dtype)
    with mock.patch.object(encoding, "load_text_encoder", return_value=qwen):
        encode = text.encoder()
    draw = np.random.default_rng(0)
    count = arguments.captions or (512 if full else 48)
    captions = [" ".join(f"w{word}" for word in draw.integers(0, 1000, _WORDS)) for _ in range(count)]
    picture = _pictures(folder / "one", 1, 1, 128)[0]
    batches = [captions[start : start + 8] for start in range(0, count, 8)]

    def plan(name: str):  # type: ignore[no-untyped-def]
        return plan_captions([(picture, caption) for caption in captions], model=name, options={})

    def alone(timed: _Timed) -> None:
        for batch in batches:
            timed(batch)

    def in_turn(timed: _Timed) -> None:
        missing = plan("in turn")._missing
        for start in range(0, count, 8):
            items = missing[start : start + 8]
            for item, tensors in zip(items, timed([item.source for item in items]), strict=True):
                item.cache.write(item.key, tensors)

    def ours(timed: _Timed) -> None:
        plan("ours").encode(timed, batch_size=8, progress=False)

    candidates = {"encoder alone": alone, "in turn": in_turn, "ours": ours}
    case = f"{count} captions of {_WORDS} words, batches of 8"
    yield from _measured(case, candidates, encode, count, "captions/s", folder, arguments)


def _measured(
    case: str,
    candidates: dict[str, Callable[[_Timed], None]],
    encode: Callable[[Any], Any],
    count: int,
    unit: str,
    folder: Path,
    arguments: argparse.Namespace,
) -> Iterator[Row]:
    """Run the candidates in turn, each on an empty cache."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    shares: dict[str, list[float]] = {name: [] for name in candidates}
    peaks: dict[str, int] = {}
    for counted in [False] + [True] * arguments.rounds:
        for name, candidate in candidates.items():
            for cache in folder.rglob(".anima_cache"):
                for kind in ("latents", "text"):
                    shutil.rmtree(cache / kind, ignore_errors=True)
            timed = _Timed(encode, arguments.device)
            with PeakMemory(arguments.device) as memory:
                start = time.perf_counter()
                candidate(timed)
                seconds = time.perf_counter() - start
            if counted:
                times[name].append(seconds)
                shares[name].append(timed.seconds / seconds)
                peaks[name] = max(peaks.get(name, 0), memory.peak)
    for name in candidates:
        yield Row(
            case=case,
            name=name,
            median=count / statistics.median(times[name]),
            unit=unit,
            ratio=median_ratio(times, name, "encoder alone"),
            reference="encoder alone",
            peak_bytes=peaks[name],
            figures={"share in the encoder": statistics.median(shares[name])},
        )


def _pictures(folder: Path, count: int, scale: int, side: int) -> tuple[Picture, ...]:
    """So many pictures with smooth colours and some noise, as photographs have, in the buckets of `side` x `side`."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        width, height = (scale * length for length in _SOURCES[number % len(_SOURCES)])
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
        noise = draw.integers(0, 8, (height, width, 1), dtype=np.uint8)
        Image.fromarray(np.asarray(coarse) // 2 + noise).save(folder / f"{number}.png", compress_level=1)
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    spec = DatasetSpec((SubsetSpec(folder),), resolution=(side, side), enable_bucket=True, min_bucket_reso=64)
    return scan([spec], progress=False)

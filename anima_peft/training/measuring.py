"""How long encoding and training take on this machine, by a few real steps of each bucket."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory

from ..data.buckets import VAE_FACTOR
from ..data.dataset import LATENT_CHANNELS, MIN_PROMPT_ROWS
from ..data.pictures import Picture, load_pixels
from ..data.summary import BucketRow, bucket_rows, table
from ..transformer import AnimaTransformerModel
from .device import DTYPES, require_device
from .encoding import TextModels, latent_encoder, report_cut_captions
from .engine import engine
from .loop import batch_loss
from .network import add_network, load_base, locate_sources, require_weights
from .objective import flow_loss
from .prepare import optimization, prepare_model
from .samples import planned_steps, steps_of_epoch

if TYPE_CHECKING:
    from ..config import TrainOptions

_STEPS = 4  # of which the first, where kernels are chosen and memory is found, does not count
_GIB = 2**30


@dataclass(frozen=True)
class BucketTime:
    """What one bucket takes."""

    row: BucketRow
    batch_size: int
    encoding: float
    """Seconds for the VAE to encode one picture."""
    batch: float
    """Seconds for one batch forwards and backwards, and one optimizer step."""


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        buckets: each with its times.
        device: on which.
        memory: bytes at the peak, the card's, or without one the process's.
        to_encode: pictures to encode before the run, mirrored ones counted.
        epochs: of the run.
    """

    buckets: tuple[BucketTime, ...]
    device: str
    memory: int
    to_encode: int
    epochs: float

    def report(self) -> str:
        """A table, and what it means for the run."""
        lines = [
            [f"{b.row.bucket[0]} x {b.row.bucket[1]}", str(b.batch_size), f"{b.encoding:.3f}", f"{b.batch:.3f}"]
            for b in self.buckets
        ]
        pictures = sum(b.row.pictures for b in self.buckets)
        encoding = self.to_encode / pictures * sum(b.encoding * b.row.pictures for b in self.buckets)
        training = self.epochs * sum(b.batch * b.row.batches for b in self.buckets)
        return "\n".join(
            [
                table([["bucket", "batch size", "s / VAE picture", "s / batch"], *lines]),
                f"Encoding {self.to_encode} pictures: about {_duration(encoding)}, where the cache is empty.",
                f"Training: about {_duration(training)}; the encoding of captions is not in it.",
                f"Memory at the peak of a step: {self.memory / _GIB:.2f} GiB ({self.device}).",
            ]
        )


def measure(options: TrainOptions, pictures: tuple[Picture, ...]) -> Measured:
    """Load the model, and time the VAE and a few training steps at the size of each bucket. Nothing is written.

    Captions that are longer than `anima_seq_len` are named in a warning.

    Raises:
        InputError: a part of the model cannot be loaded.
    """
    rows = bucket_rows(pictures)
    loop, dtype = options.loop, DTYPES[options.loop.mixed_precision]
    with engine(options) as accelerator:
        device = accelerator.device
        require_device(options, device)
        require_weights(options)
        sources = locate_sources(options)
        encoding = _encoding_times(rows, pictures, sources.vae, dtype, device, tiling=options.memory.vae_tiling)
        model = load_base(sources.transformer, options, dtype, device)
        length = options.model.anima_seq_len
        text = TextModels(sources, model, "", dtype, device, length, options.trains_conditioner)
        report_cut_captions({picture.caption: picture for picture in pictures}, text)
        add_network(model, options)
        prepare_model(model, options, accelerator)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = _batch_times(rows, pictures, model, options, accelerator)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss
    batches = sum(row.batches for row in rows)
    return Measured(
        tuple(
            BucketTime(row, _batch_size(row, pictures), encoded, batch)
            for row, encoded, batch in zip(rows, encoding, times, strict=True)
        ),
        device.type,
        memory,
        sum(1 + picture.flip_aug for picture in pictures),
        planned_steps(loop, batches) / steps_of_epoch(loop, batches),
    )


def _encoding_times(
    rows: list[BucketRow],
    pictures: tuple[Picture, ...],
    vae: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tiling: bool,
) -> list[float]:
    encode = latent_encoder(vae, dtype, device, tiling=tiling)
    times = []
    for row in rows:
        pixels = load_pixels(_first(row, pictures), flip=False)[None]
        times.append(_seconds(partial(encode, pixels), device))
    del encode
    free_memory()
    return times


def _batch_times(
    rows: list[BucketRow],
    pictures: tuple[Picture, ...],
    model: AnimaTransformerModel,
    options: TrainOptions,
    accelerator: Accelerator,
) -> list[float]:
    optimizer, _, _ = optimization(model, options, _STEPS)
    ready, optimizer = accelerator.prepare(model, optimizer, device_placement=[False, True])
    ready.train()
    loss_of, device = flow_loss(options), accelerator.device
    text = _text(model, options, device)
    times = []
    for row in rows:
        size = _batch_size(row, pictures)
        shape = (size, LATENT_CHANNELS, row.bucket[1] // VAE_FACTOR, row.bucket[0] // VAE_FACTOR)
        batch = {
            "latents": torch.zeros(shape, device=device),
            "noise": torch.randn(shape, device=device),
            "sigma": torch.full((size,), 0.5, device=device),
            **{name: tensor.expand(size, *tensor.shape[1:]) for name, tensor in text.items()},
        }

        def step(batch: dict[str, torch.Tensor] = batch) -> None:
            accelerator.backward(batch_loss(ready, batch, loss_of))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        times.append(_seconds(step, device))
    return times


def _text(model: AnimaTransformerModel, options: TrainOptions, device: torch.device) -> dict[str, torch.Tensor]:
    """What stands for an encoded caption of 512 rows."""
    config = model.text_conditioner.config
    if not options.trains_conditioner:
        return {"prompt_embeds": torch.zeros(1, MIN_PROMPT_ROWS, config.target_dim, dtype=model.dtype, device=device)}
    rows = (1, MIN_PROMPT_ROWS)
    return {
        "qwen_hidden_states": torch.zeros(*rows, config.source_dim, dtype=model.dtype, device=device),
        "qwen_attention_mask": torch.ones(rows, dtype=torch.int64, device=device),
        "t5_input_ids": torch.ones(rows, dtype=torch.int64, device=device),
        "t5_attention_mask": torch.ones(rows, dtype=torch.int64, device=device),
    }


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """The median over a few calls, after one that does not count."""
    times = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _first(row: BucketRow, pictures: tuple[Picture, ...]) -> Picture:
    return next(p for p in pictures if p.dataset_index == row.dataset_index and p.placement.bucket == row.bucket)


def _batch_size(row: BucketRow, pictures: tuple[Picture, ...]) -> int:
    return min(_first(row, pictures).batch_size, row.samples)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"

"""A synthetic dataset of any size with a complete cache, and one start of a run on it, measured from inside.

`python -m benchmarks.growth_start FOLDER build|start` is a process of its own, so that memory is that of one run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from anima_peft.config import RunConfig, load
from anima_peft.data import caching
from anima_peft.data.pictures import Picture
from anima_peft.miniature import miniature_files, write_random_miniature
from anima_peft.training import encoding, run
from anima_peft.training.health import Health
from anima_peft.training.loop import Parts, run_loop
from anima_peft.training.state import Progress

from .measure import PeakMemory

_SIZES = ((64, 64), (96, 64), (64, 96), (112, 64), (64, 112), (128, 64), (64, 128), (80, 64), (64, 80))
_TAGS = tuple(f"tag {number}" for number in range(5000))
_TAGS_OF_PICTURE = 20
_STEPS = 60
_LATE = 0.9  # of the epoch
_DATASET = """
[[datasets]]
resolution = 64
batch_size = 1
enable_bucket = true
min_bucket_reso = 16
max_bucket_reso = 256
bucket_reso_steps = 16
[[datasets.subsets]]
image_dir = '{}'
"""


@dataclass(frozen=True)
class Start:
    """What one start of a run with a complete cache took.

    Attributes:
        pictures: of the dataset.
        seconds: from the call to the first step, everything imported.
        scan: of these, the search for pictures and captions.
        above: bytes of resident memory at most, above the process with everything imported.
        step: seconds of a step at the start of the epoch, the median.
        late_step: the same at nine tenths of the epoch.
        late_start: seconds from the loop's start there to the end of its first step, as after a resume.
        metadata: seconds for the metadata of one save.
    """

    pictures: int
    seconds: float
    scan: float
    above: int
    step: float
    late_step: float
    late_start: float
    metadata: float


class _Measured(Exception):
    pass


def build(folder: Path, pictures: int) -> None:
    """Write a miniature model, so many small pictures with captions, all different, and their cache."""
    write_random_miniature(folder / "model", overwrite=True)
    images = folder / "pictures"
    images.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(pictures):
        width, height = _SIZES[number % len(_SIZES)]
        # Flat, for a small file, but for the number in its first pixels.
        pixels = np.full((height, width, 3), draw.integers(0, 256, 3), dtype=np.uint8)
        pixels[0, :2] = np.frombuffer(number.to_bytes(6, "little"), dtype=np.uint8).reshape(2, 3)
        Image.fromarray(pixels).save(images / f"{number}.png", compress_level=1)
        tags = [_TAGS[tag] for tag in draw.integers(0, len(_TAGS), _TAGS_OF_PICTURE)]
        (images / f"{number}.txt").write_text(", ".join([f"number {number}", *tags]), encoding="utf-8")
    (folder / "dataset.toml").write_text(_DATASET.format(images), encoding="utf-8")

    # Encoders and pixels stand in: what is kept has the right shapes, and the way to the cache is the run's own.
    def pixels_of(picture: Picture, flip: bool) -> torch.Tensor:
        return torch.zeros(3, *reversed(picture.placement.bucket))

    def latents(*_: Any, **__: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda pixels: torch.zeros(len(pixels), 16, pixels.shape[2] // 8, pixels.shape[3] // 8)

    def texts(_: Any) -> Callable[[list[str]], list[dict[str, torch.Tensor]]]:
        return lambda captions: [{"prompt_embeds": torch.zeros(24, 64)} for _ in captions]

    with (
        mock.patch.object(caching, "load_pixels", pixels_of),
        mock.patch.object(encoding, "latent_encoder", latents),
        mock.patch.object(encoding.TextModels, "encoder", texts),
        mock.patch.object(run, "run_watched", side_effect=_Measured),
    ):
        _train(_config(folder))


def start(folder: Path) -> Start:
    """Start a run on what `build` has made, and take some steps early and late in its first epoch."""
    found: dict[str, Any] = {}
    began = time.perf_counter()

    def instead(accelerator: Any, options: Any, parts: Parts, progress: Progress, *rest: Any) -> None:
        found["seconds"] = time.perf_counter() - began
        memory.__exit__()
        found.update(_steps(rest[1], options, parts, progress, accelerator))
        raise _Measured

    scan = run.scan

    def timed_scan(*arguments: Any, **options: Any) -> tuple[Picture, ...]:
        before = time.perf_counter()
        pictures = scan(*arguments, **options)
        found["scan"], found["pictures"] = time.perf_counter() - before, len(pictures)
        return pictures

    memory = PeakMemory(torch.device("cpu"))
    memory.__enter__()
    with mock.patch.object(run, "run_watched", instead), mock.patch.object(run, "scan", timed_scan):
        _train(_config(folder))
    return Start(above=memory.above, **found)


def _steps(saver: Any, options: Any, parts: Parts, progress: Progress, accelerator: Any) -> dict[str, float]:
    """Times of steps early and late in the epoch, and of a save's metadata."""
    batches = len(parts.loader)
    health = Health(0, progress, lambda batches: [])

    def steps_from(batch: int) -> list[float]:
        progress.batch = batch
        times = [time.perf_counter()]
        run_loop(
            accelerator,
            parts,
            progress,
            total_steps=progress.step + min(_STEPS, batches - batch),
            max_grad_norm=options.optimizer.max_grad_norm,
            health=health,
            on_step=lambda: times.append(time.perf_counter()),
            on_epoch=lambda: None,
        )
        return [after - before for before, after in pairwise(times)]

    early, late = steps_from(0), steps_from(int(_LATE * batches))
    before = time.perf_counter()
    saver._metadata(progress)
    return {
        "step": statistics.median(early[1:]),
        "late_step": statistics.median(late[1:]),
        "late_start": late[0],
        "metadata": time.perf_counter() - before,
    }


def _train(config: RunConfig) -> None:
    try:
        run.train(config)
    except _Measured:
        return
    raise AssertionError("the run went on")


def _config(folder: Path) -> RunConfig:
    model = miniature_files(folder / "model")
    given = {
        "dataset_config": folder / "dataset.toml",
        "anima_transformer": model.transformer,
        "vae": model.vae,
        "qwen": model.text_encoder,
        "qwen_tokenizer_dir": model.tokenizer,
        "t5_tokenizer_dir": model.t5_tokenizer,
        "network_module": "networks.lora_anima",
        "network_dim": 4,
        "learning_rate": 1e-4,
        "mixed_precision": "no",
        "max_train_epochs": 1,
        "output_dir": folder / "output",
        "output_name": "growth",
        "log_with": "none",
    }
    return load([word for name, value in given.items() for word in (f"--{name}", str(value))])


def main(argv: Sequence[str]) -> None:
    """`FOLDER build COUNT` or `FOLDER start`; the latter prints a `Start` as JSON in its last line."""
    folder = Path(argv[0])
    if argv[1] == "build":
        build(folder, int(argv[2]))
    else:
        print(json.dumps(asdict(start(folder))))


if __name__ == "__main__":
    main(sys.argv[1:])

"""`anima-peft miniature` writes the small Anima; `anima-peft miniature-score` asks what an adapter has taught it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from ..files import write_atomically
from ..generation import labelled_grid, save_picture
from ..pipeline import AnimaPipeline
from .exams import Question, base_exam, draw_exam, figure_exam, style_exam
from .layout import MiniatureFiles, miniature_files
from .scoring import Score, score
from .trained import write_miniature

_EXAMS = {"figure": figure_exam, "style": style_exam}
_SHOWN = {"concept": 4, "old prompts": 2}
"""Pictures of each exam in the grid."""


def write(argv: Sequence[str]) -> None:
    """Write the trained miniature and print its paths.

    Raises:
        InputError: one is there already and `--overwrite` was not given.
    """
    parser = argparse.ArgumentParser(
        prog="anima-peft miniature",
        description="Write a small Anima that draws coloured shapes, and two sets of pictures for adapters to learn.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="folder to write to; made if missing")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier miniature")
    arguments = parser.parse_args(argv)
    files = write_miniature(arguments.folder, overwrite=arguments.overwrite)
    for path in [*vars(files).values(), files.figure, files.style]:
        print(path)


def score_adapter(argv: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Score the concept's held-out prompts and the old prompts without and with an adapter.

    Writes `scores.json`, a grid of the concept's first pictures, and both into a TensorBoard log.

    Returns:
        "concept" and "old prompts" -> "before" and "after" -> score.

    Raises:
        InputError: the miniature or the adapter is missing or unreadable, or files would be overwritten.
    """
    arguments = _parser().parse_args(argv)
    adapter = _find_adapter(arguments.adapter)
    folder = adapter.parent
    written = [folder / "scores.json", folder / f"{adapter.stem}-scored.png"]
    taken = [path for path in written if path.exists()]
    if taken and not arguments.overwrite:
        raise InputError(f"{taken[0]} exists already; move it away or add --overwrite.")
    pipe = load_pipeline(miniature_files(arguments.miniature))
    exams = {"concept": _EXAMS[arguments.concept](), "old prompts": base_exam()}
    # Without first, but a fault in the adapter's file is found before anything is drawn.
    pipe.load_lora_weights(adapter, adapter_name="scored")
    pipe.disable_lora()
    before = {name: draw_exam(pipe, exam) for name, exam in exams.items()}
    pipe.enable_lora()
    pipe.set_adapters("scored", arguments.strength)
    after = {name: draw_exam(pipe, exam) for name, exam in exams.items()}
    scores = {
        name: {"before": _score(before[name], exam), "after": _score(after[name], exam)} for name, exam in exams.items()
    }
    grid = _grid(exams, before, after, scores)
    save_picture(grid, written[1])
    report = {
        "adapter": adapter.name,
        "strength": arguments.strength,
        "concept": arguments.concept,
        "scores": {name: {when: _as_json(s) for when, s in pair.items()} for name, pair in scores.items()},
    }
    text = (json.dumps(report, indent=2) + "\n").encode()
    write_atomically(written[0], partial(Path.write_bytes, data=text))
    _log(folder / "logs" / f"{adapter.stem}_scores", scores, grid)
    for name, pair in scores.items():
        label = arguments.concept if name == "concept" else name
        print(f"{label}: {pair['before']} right before, {pair['after']} after")
    for path in written:
        print(path)
    return scores


def load_pipeline(files: MiniatureFiles) -> AnimaPipeline:
    """The miniature in float32 on the CPU.

    Raises:
        InputError: a file is missing or unreadable.
    """
    pipe = AnimaPipeline.from_single_files(
        transformer=files.transformer,
        text_encoder=files.text_encoder,
        vae=files.vae,
        tokenizer=files.tokenizer,
        t5_tokenizer=files.t5_tokenizer,
        torch_dtype=torch.float32,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anima-peft miniature-score",
        description="Draw fixed prompts with seeds of their own, without and with an adapter, and count by their "
        "pixels which pictures are right.",
        allow_abbrev=False,
    )
    parser.add_argument("miniature", type=Path, help="folder that `anima-peft miniature` wrote")
    parser.add_argument("adapter", type=Path, help="adapter file, or a folder: the newest adapter anywhere in it")
    parser.add_argument("--concept", choices=_EXAMS, default="figure", help="what it was trained on (default figure)")
    parser.add_argument("--strength", type=float, default=1.0, help="of the adapter (default 1.0)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier scores beside the adapter")
    return parser


def _find_adapter(path: Path) -> Path:
    if path.is_file():
        return path
    states = "-state"  # a run's state holds tensors that are no adapter of their own
    found = [file for file in path.rglob("*.safetensors") if not any(states in part for part in file.parts[:-1])]
    if not found:
        raise InputError(f"{path}: no adapter file (.safetensors) and no folder with one.")
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def _score(pictures: Sequence[Image.Image], exam: Sequence[Question]) -> Score:
    return score(pictures, [question.scene for question in exam])


def _as_json(result: Score) -> dict[str, Any]:
    return {**asdict(result), "share": round(result.share, 4)}


def _grid(
    exams: dict[str, list[Question]],
    before: dict[str, list[Image.Image]],
    after: dict[str, list[Image.Image]],
    scores: dict[str, dict[str, Score]],
) -> Image.Image:
    """The first pictures of each exam, twice their size: without the adapter above, with it below."""
    columns = [question.scene.caption for name, shown in _SHOWN.items() for question in exams[name][:shown]]
    rows = [
        [
            picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
            for name, shown in _SHOWN.items()
            for picture in pictures[name][:shown]
        ]
        for pictures in (before, after)
    ]
    labels = [
        f"{words} the adapter: " + ", ".join(f"{name} {pair[when]} right" for name, pair in scores.items())
        for words, when in (("without", "before"), ("with", "after"))
    ]
    return labelled_grid(rows, labels, columns)


def _log(folder: Path, scores: dict[str, dict[str, Score]], grid: Image.Image) -> None:
    """Both scores as curves of two points, 0 before and 1 after, and the grid."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

    with SummaryWriter(str(folder)) as log:
        for name, pair in scores.items():
            for step, result in enumerate(pair.values()):
                log.add_scalar(f"score/{name}", result.share, step)
        log.add_image("before and after", np.asarray(grid), dataformats="HWC")

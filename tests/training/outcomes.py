"""What runs have left, read back to be compared."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def events_of(log_folder: Path | None) -> EventAccumulator:
    """TensorBoard's log."""
    assert log_folder is not None
    return EventAccumulator(str(log_folder)).Reload()


def scalars(log_folder: Path | None, tag: str) -> list[tuple[int, float]]:
    """Steps and values that are logged under a name."""
    return [(event.step, event.value) for event in events_of(log_folder).Scalars(tag)]


def losses_of(log_folder: Path | None) -> list[float]:
    """The loss of every step."""
    return [value for _, value in scalars(log_folder, "loss")]


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files hold the same names, dtypes and bits."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def names_in(folder: Path) -> list[str]:
    """But for the record and the report, which are written last of all."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(("-log.jsonl", "-report.html")))

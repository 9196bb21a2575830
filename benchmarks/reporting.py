"""What a benchmark measured: rows, tables of them, and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch

from anima_peft.data.summary import table

from .measure import machine

_PACKAGES = ("anima-peft", "torch", "diffusers", "peft", "transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Row:
    """One candidate of one case.

    Attributes:
        case: what the candidates of a table have in common: sizes, dtype, tokens.
        name: of the candidate.
        median: over the rounds, in `unit`; None where only the other figures were taken.
        unit: such as "ms" or "pictures/s".
        ratio: the median, over the rounds, of this candidate's time over its reference's in the same round.
        reference: the candidate that `ratio` refers to.
        peak_bytes: most memory in use, of the device or on a CPU of the process.
        figures: further numbers by their column's heading.
    """

    case: str
    name: str
    median: float | None
    unit: str
    ratio: float | None = None
    reference: str | None = None
    peak_bytes: int | None = None
    figures: Mapping[str, float | int | str] = field(default_factory=dict)


def print_tables(rows: Iterable[Row]) -> list[Row]:
    """Print one table a case, each as soon as its rows are measured; returns all rows."""
    seen: list[Row] = []
    for case, group in groupby(rows, key=lambda row: row.case):
        own = list(group)
        seen += own
        print(f"\n{case}\n{case_table(own)}", flush=True)
    return seen


def case_table(rows: Sequence[Row]) -> str:
    """Medians, ratios, MiB and further figures of one case, aligned; a column that no row fills is left out."""
    units = list(dict.fromkeys(row.unit for row in rows))
    references = list(dict.fromkeys(row.reference for row in rows if row.reference))
    extra = list(dict.fromkeys(name for row in rows for name in row.figures))
    heading = ["", units[0] if len(units) == 1 else "", *(f"/ {name}" for name in references)]
    lines = [
        [
            row.name,
            _number(row.median) + (f" {row.unit}" if len(units) > 1 else ""),
            *(f"{row.ratio:.2f}" if row.ratio is not None and row.reference == name else "" for name in references),
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
            *(_number(row.figures.get(name)) for name in extra),
        ]
        for row in rows
    ]
    whole = [[*heading, "peak MiB", *extra], *lines]
    filled = [column for column in range(len(whole[0])) if any(line[column] for line in lines)]
    return table([[line[column] for column in filled] for line in whole])


def write_json(
    path: str | Path, command: Sequence[str], device: torch.device, benchmarks: Mapping[str, Sequence[Row]]
) -> None:
    """Write every row with the machine, the packages' versions and the command that gave it."""
    content = {
        "command": " ".join(command),
        "machine": machine(device),
        "versions": {name: version(name) for name in _PACKAGES},
        "benchmarks": {name: [asdict(row) for row in rows] for name, rows in benchmarks.items()},
    }
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _number(value: float | int | str | None) -> str:
    """About three digits that count."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"

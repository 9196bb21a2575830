"""The page about a run: everything in one file, which fetches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined
from safetensors import SafetensorError, safe_open

from ...data.summary import size_text
from ...files import write_atomically
from ..outputs import Outputs
from ..thinning import evenly
from .charts import charts_of
from .curves import finite, smooth, smoothing_window
from .history import History, Preview, read_history
from .pictures import BUDGET, Embedded, embed

_MOST_TIMES, _MOST_PICTURES = 12, 96
_LONGEST_VALUE = 2000  # characters of a value of the metadata that are shown


@dataclass(frozen=True)
class Figure:
    """A picture of the page with what stands below it; `picture` is None where its file cannot be shown."""

    caption: str
    picture: Embedded | None


@dataclass(frozen=True)
class ConfigLine:
    """An option: name and value as TOML, and where the value comes from; only `text` where it is a heading."""

    text: str
    origin: str
    is_default: bool


def write_report(outputs: Outputs) -> Path:
    """Write the page about the run that these outputs belong to; returns its path.

    Raises:
        InputError: there is no record of the run.
        OSError: the page cannot be written.
    """
    text = page(outputs, read_history(outputs.record))
    write_atomically(outputs.report, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
    return outputs.report


def page(outputs: Outputs, history: History) -> str:
    """The page as HTML. All that comes from the run is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = files(__package__)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    shown = _choose_times(history.previews)
    count = sum(map(len, shown.values())) + 2 * len(history.comparisons)
    limit = BUDGET // max(count, 1)
    facts = history.facts
    return template.render(
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        name=outputs.name,
        overview=_rows(facts.get("overview"), 2),
        status=_status(history),
        cards=_cards(outputs, history),
        error=history.end[1] if history.end and history.end[0] != "done" else "",
        warnings=sorted(history.warnings.items(), key=lambda item: item[1]),
        damaged=history.damaged,
        started=_time(history.started),
        written=_time(history.written),
        sessions=history.sessions,
        charts=charts_of(history.curves),
        previews={name: _figures(outputs.folder, pictures, limit) for name, pictures in shown.items()},
        comparisons=[
            (pair.prompt, embed(outputs.folder, pair.without, limit), embed(outputs.folder, pair.with_adapter, limit))
            for pair in history.comparisons
        ],
        pictures=_rows(facts.get("pictures")),
        notes=_texts(facts.get("notes")),
        config=config_lines(str(facts.get("config", ""))),
        metadata=_metadata(outputs.final),
        files=[
            (path.name, size_text(path.stat().st_size))
            for path in outputs.existing()
            if path.is_file() and path.parent == outputs.folder
        ],
        version=facts.get("version", ""),
    )


def _status(history: History) -> str:
    return history.end[0] if history.end else "running"


def _cards(outputs: Outputs, history: History) -> dict[str, str]:
    """The figures at the top, those that there are."""
    total = history.facts.get("total_steps")
    cards = {"steps": f"{history.step:,} / {total:,}" if isinstance(total, int) else f"{history.step:,}"}
    _, losses = finite(history.curves.get("loss", {}))
    if losses:
        cards["loss"] = f"{smooth(losses, smoothing_window(len(losses)))[-1]:.4g}"
    _, validation = finite(history.curves.get("validation/loss", {}))
    if validation:
        cards["validation"] = f"{validation[0]:.3g} → {validation[-1]:.3g}"
    cards["time"] = _duration(history.seconds)
    _, speeds = finite(history.curves.get("samples_per_second", {}))
    if speeds:
        cards["speed"] = f"{median(speeds):.3g}"
    if losses and history.seconds:
        cards["step_time"] = f"{history.seconds / len(losses):.3g} s"
    _, memory = finite(history.curves.get("peak_memory_gib", {}))
    if memory:
        cards["memory"] = f"{max(memory):.3g} GiB"
    if outputs.final.is_file():
        cards["file"] = size_text(outputs.final.stat().st_size)
    return cards


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def _time(text: str) -> str:
    try:
        return f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return text


def _choose_times(previews: Mapping[str, Sequence[Preview]]) -> dict[str, list[Preview]]:
    """Of each prompt as many pictures as the page bears, evenly, with the first and the last."""
    most = max(2, min(_MOST_TIMES, _MOST_PICTURES // max(len(previews), 1)))
    return {
        name: evenly(sorted(pictures, key=lambda picture: picture.step), most)
        for name, pictures in list(previews.items())[: _MOST_PICTURES // 2]
    }


def _figures(folder: Path, pictures: Sequence[Preview], limit: int) -> list[Figure]:
    return [Figure(f"{picture.step:,}", embed(folder, picture.file, limit)) for picture in pictures]


def config_lines(text: str) -> list[ConfigLine]:
    """The resolved configuration line by line, with the comment that names the origin apart."""
    lines = []
    for line in text.splitlines():
        value, found, origin = line.rpartition("  # ")
        if found and value.strip():
            lines.append(ConfigLine(value, origin, origin.startswith("default")))
        else:
            lines.append(ConfigLine(line, "", line.strip().endswith(": not set")))
    return lines


def _metadata(adapter: Path) -> list[tuple[str, str]]:
    """The adapter file's, sorted; nothing where there is no whole file yet."""
    try:
        with safe_open(adapter, framework="pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError):
        return []
    return [
        (key, value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]} …")
        for key, value in sorted(found.items())
    ]


def _rows(value: Any, width: int | None = None) -> list[list[str]]:
    """A table out of a record, or nothing."""
    rows = [_texts(row) for row in value if isinstance(row, list)] if isinstance(value, list) else []
    return [row for row in rows if row and (width is None or len(row) == width)]


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []

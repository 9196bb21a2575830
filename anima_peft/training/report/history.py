"""What a run's record tells, read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..record import parse_lines


@dataclass(frozen=True)
class Preview:
    """A picture that was drawn while training.

    Attributes:
        step: after so many steps.
        file: relative to the run's folder.
    """

    step: int
    file: str


@dataclass(frozen=True)
class Comparison:
    """A prompt drawn without and with the adapter, files relative to the run's folder."""

    prompt: str
    without: str
    with_adapter: str


@dataclass
class History:
    """A record's content; of a step that was measured twice the later values.

    Attributes:
        facts: of the last session, as `run_facts` makes them.
        started: of the first session, ISO 8601.
        sessions: how often the run was started or went on.
        step: the last one that is known of.
        seconds: in all sessions, from their begin to their last step.
        curves: by name, value by step; None where a value was not finite.
        previews: by the name of the prompt.
        comparisons: by prompt and seed, as they were drawn.
        warnings: step and text, each text once.
        end: how the last session ended and the text of its error; None while it is at work, or after it was killed.
        written: when the record was last written, ISO 8601.
        damaged: lines that could not be read.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    sessions: int = 0
    step: int = 0
    seconds: float = 0.0
    curves: dict[str, dict[int, float | None]] = field(default_factory=dict)
    previews: dict[str, list[Preview]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    warnings: dict[str, int] = field(default_factory=dict)
    end: tuple[str, str] | None = None
    written: str = ""
    damaged: int = 0


def read_history(path: Path) -> History:
    """Read a record; also one that is being written, or whose last line a crash has cut off.

    Raises:
        InputError: it cannot be read, or is no record.
    """
    history = History()
    session_seconds = 0.0
    try:
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        with path.open(encoding="utf-8", errors="replace") as file:
            for _, entry in parse_lines(file):
                if entry is None:
                    history.damaged += 1
                    continue
                if entry["kind"] == "session":
                    history.seconds += session_seconds
                session_seconds = _take(history, entry, session_seconds)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not history.sessions:
        raise InputError(f"{path}: expected the record of a run, as training writes it, and found no session in it")
    history.seconds += session_seconds
    history.written = written.isoformat(timespec="seconds")
    return history


def _take(history: History, entry: dict[str, Any], session_seconds: float) -> float:
    """Put one line where it belongs; returns how long the session has lasted by then."""
    kind, step = entry.pop("kind"), entry.pop("step")
    history.step = max(history.step, step)
    if kind == "session":
        facts = entry.get("facts")
        history.facts = facts if isinstance(facts, dict) else {}
        history.started = history.started or str(entry.get("at", ""))
        history.sessions += 1
        history.end = None
        return 0.0
    if kind == "values":
        seconds = entry.pop("time", None)
        for name, value in entry.items():
            if value is None or isinstance(value, (int, float)):
                history.curves.setdefault(name, {})[step] = value
        return seconds if isinstance(seconds, (int, float)) else session_seconds
    if kind == "picture":
        pictures = history.previews.setdefault(str(entry.get("name", "")), [])
        pictures[:] = [picture for picture in pictures if picture.step != step]
        pictures.append(Preview(step, str(entry.get("file", ""))))
    elif kind == "compared":
        pair = Comparison(*(str(entry.get(key, "")) for key in ("prompt", "without", "with")))
        history.comparisons = [*(other for other in history.comparisons if other.without != pair.without), pair]
    elif kind == "warning":
        history.warnings.setdefault(str(entry.get("text", "")), step)
    elif kind == "end":
        history.end = str(entry.get("how", "")), str(entry.get("text", ""))
    return session_seconds

"""A run's own record: one JSON object a line, what its report is drawn from, whatever else is logged to."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from ..errors import Interrupted
from ..files import write_atomically

logger = logging.getLogger(__name__)

DIGITS = 6  # of a number that are kept
_SECONDS_BETWEEN_WRITES = 1.0


class Record(GeneralTracker):
    """One of accelerate's trackers, which writes what is logged into a file of the run's folder.

    Lines have a `kind` and the `step` at which they were written:

    - `session`: a start or a resumption; `at` (ISO 8601, UTC) and `facts`.
    - `values`: `time` in seconds since the session began, and numbers by name. Those not finite are null.
    - `picture`: a preview; its `name` and its `file`, relative to the folder.
    - `compared`: the `prompt`, and the pictures drawn `without` and `with` the adapter.
    - `warning`: its `text`.
    - `end`: `how` ("done", "stopped" or "failed"), `at`, and the `text` of an error.

    Lines are gathered and written about every second, the first of them once a step is done: a run that fails before
    leaves nothing. A resumed run goes on with the lines up to its step.

    Args:
        path: the file.
    """

    name = "record"
    requires_logging_directory = False

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._lines: list[str] = []
        self._kept: list[str] | None = None
        self._begun = self._on_disk = self._has_steps = False
        self._step = 0
        self._clock = self._written = time.perf_counter()

    @property
    def tracker(self) -> Record:
        """What accelerate asks every tracker for."""
        return self

    @property
    def is_on_disk(self) -> bool:
        """Whether this session has written anything."""
        return self._on_disk

    def begin(self, step: int, facts: Mapping[str, Any], *, continued: bool) -> None:
        """Begin a session; only in the process that writes.

        Args:
            step: optimizer steps done.
            facts: what the report says of the run, of JSON's types.
            continued: whether the run goes on that the file is of; else what it held is replaced.
        """
        self._kept = list(_up_to(self.path, step)) if continued else []
        self._has_steps = bool(self._kept)
        warnings, self._lines = self._lines, []
        self._begun, self._step = True, step
        self._clock = self._written = time.perf_counter()
        self._add("session", at=_now(), facts=facts)
        self._lines += warnings

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Note numbers of a step."""
        if not self._begun:
            return
        self._step, self._has_steps = step or 0, True
        now = time.perf_counter()
        self._add("values", time=round(now - self._clock, 2), **{name: _short(value) for name, value in values.items()})
        if now - self._written >= _SECONDS_BETWEEN_WRITES:
            self.write()

    def preview(self, step: int, name: str, path: Path) -> None:
        """Note a picture that was drawn."""
        self._step = step
        self._add("picture", name=name, file=self._relative(path))

    def compared(self, prompt: str, without: Path, with_adapter: Path) -> None:
        """Note a pair of pictures."""
        self._add("compared", prompt=prompt, without=self._relative(without), **{"with": self._relative(with_adapter)})

    def warning(self, text: str) -> None:
        """Note a warning."""
        self._add("warning", text=text)

    def end(self, how: str, text: str = "") -> None:
        """Note how the session ended, and write what is left.

        Raises:
            OSError: it cannot be written.
        """
        self._add("end", how=how, at=_now(), text=text)
        self.write()
        self._begun = False

    def write(self) -> None:
        """Bring what was gathered to the file, once there are steps.

        Raises:
            OSError: it cannot be written.
        """
        if not (self._begun and self._has_steps):
            return
        text = "".join(f"{line}\n" for line in self._lines)
        if self._kept is not None:
            whole = "".join(f"{line}\n" for line in self._kept) + text
            write_atomically(self.path, lambda path: path.write_text(whole, encoding="utf-8", newline="\n"))
            self._kept = None
        else:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(text)
        self._lines, self._on_disk, self._written = [], True, time.perf_counter()

    def _add(self, kind: str, **values: Any) -> None:
        line = {"kind": kind, "step": self._step, **values}
        self._lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")))

    def _relative(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.path.parent)).as_posix()


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Note warnings and the end of what happens inside.

    Raises:
        OSError: the record cannot be written, and nothing else has gone wrong.
    """
    handler = _Warnings(record)
    package = logging.getLogger(__package__.partition(".")[0])
    package.addHandler(handler)
    try:
        yield
    except BaseException as error:
        package.removeHandler(handler)
        try:
            record.end("stopped" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed", str(error))
        except OSError as fault:
            logger.warning("%s could not be written (%s).", record.path, fault)
        raise
    finally:
        package.removeHandler(handler)
    record.end("done")


def parse_lines(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each line and what it holds; None where it is no line of a record, as the last one of a killed run may be."""
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        whole = isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("kind"), str)
        yield line, entry if whole else None


def _up_to(path: Path, step: int) -> Iterator[str]:
    """The lines of a record that a run which stands at `step` has written."""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line, entry in parse_lines(file):
                if entry is not None and entry["step"] <= step:
                    yield line.rstrip("\n")


class _Warnings(logging.Handler):
    def __init__(self, record: Record):
        super().__init__(logging.WARNING)
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        self._record.warning(record.getMessage())


def _short(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

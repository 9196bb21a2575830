"""What a command shows while it works: bars on a terminal, lines elsewhere, warnings beside them and each once."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

from tqdm import tqdm

from .texts import escaped

LINE_BREAK = "\n"
_SECONDS_BETWEEN_LINES = 30.0
_LINE = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """tqdm on a terminal. Where standard error goes elsewhere, a plain line twice a minute, the first after as long."""
    if not sys.stderr.isatty():
        options |= {
            "file": _Lines(sys.stderr),
            "bar_format": _LINE,
            "mininterval": _SECONDS_BETWEEN_LINES,
            "maxinterval": _SECONDS_BETWEEN_LINES,
            "delay": _SECONDS_BETWEEN_LINES,
        }
    return tqdm(*args, **options)


def prepare_terminal(level: int) -> None:
    """Make standard output take every character, and the log from this level on go to standard error beside bars."""
    for stream in (sys.stdout, sys.stderr):
        # Names and captions may have characters that a console of Windows has not (cp1252, GBK).
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(_BesideBars())
    handler.addFilter(_Once())
    handler.setFormatter(_Escaping("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class _Escaping(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record), keep=LINE_BREAK)


class _Lines:
    """Takes what tqdm writes, and hands on what it says as lines without control characters."""

    def __init__(self, stream: TextIO):
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            self._stream.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()


class _BesideBars:
    """Standard error as it is at the time of writing, with bars put below what is written."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


class _Once(logging.Filter):
    """Lets each message pass the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text in self._seen:
            return False
        self._seen.add(text)
        return True

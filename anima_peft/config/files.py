"""Reads text and TOML files; a file that cannot be read is the user's to mend, so it says which file and line."""

from __future__ import annotations

import codecs
import re
import tomllib
from pathlib import Path

from ..errors import InputError

MOST_BYTES = 2**24


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: the file is missing or unreadable, far too large, or not UTF-8. It names the file and the line.
    """
    try:
        with path.open("rb") as file:  # also a pipe, which shells make of `<(...)`
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(data) > MOST_BYTES:
        raise InputError(f"{path}: more than {MOST_BYTES >> 20} MiB, which is no text file of options or prompts")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error


def read_toml(path: Path) -> dict[str, object]:
    """The content of a TOML file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: the file is missing or unreadable, not UTF-8, or not TOML. It names the file and the line.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer too long for Python to read
        raise InputError(f"{path}, {_explained(str(error), text)}") from error


def _explained(message: str, text: str) -> str:
    """tomllib's message with the line in front, and a hint for the usual slip."""
    lines = text.splitlines() or [""]
    place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if place is None:
        return f"not TOML: {message}"
    number = int(place[1]) if place[1] else len(lines)
    hint = ""
    if number <= len(lines) and "\\" in lines[number - 1]:
        hint = "; write Windows paths with / or in 'single quotes'"
    return f"line {number}: not TOML: {message[: place.start()]}{hint}"

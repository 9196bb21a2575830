"""Files of prompts to draw while training: sd-scripts' text lines, TOML or JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..limited import parse_json
from .files import read_text, read_toml
from .prompts import PromptLine, parse_prompt_line
from .reading import nearest, shown

# name in TOML and JSON -> flag of a text line (sd-scripts, library/train_util.py, load_prompts)
_KEYS = {
    "negative_prompt": "n",
    "width": "w",
    "height": "h",
    "seed": "d",
    "sample_steps": "s",
    "scale": "l",
    "flow_shift": "fs",
}


def read_prompts(path: Path) -> tuple[PromptLine, ...]:
    """The prompts of a `.txt` (one a line, `#` starts a comment), `.toml` or `.json` file.

    TOML: the defaults in `[prompt]`, and each prompt with what differs in `[[prompt.subset]]`. JSON: a list of objects.

    Raises:
        InputError: the file cannot be read, holds no prompt, or some are faulty; all faults are listed.
    """
    suffix = path.suffix.lower()
    readers = {".txt": _from_text, ".toml": _from_toml, ".json": _from_json}
    if suffix not in readers:
        raise InputError(f"{path}: expected a .txt, .toml or .json file of prompts")
    prompts, faults = [], []
    for place, text in readers[suffix](path):
        try:
            prompts.append(parse_prompt_line(text))
        except InputError as fault:
            faults.append(f"{place}: {fault}")
    if not prompts and not faults:
        faults.append("holds no prompt")
    if faults:
        raise InputError.from_faults(f"{path}:", faults)
    return tuple(prompts)


def _from_text(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(StringIO(read_text(path), newline=None), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"line {number}", line.strip()


def _from_toml(path: Path) -> Iterator[tuple[str, str]]:
    table = read_toml(path).get("prompt")
    subsets = table.get("subset") if isinstance(table, Mapping) else None
    if not isinstance(table, Mapping) or not isinstance(subsets, list):
        raise InputError(f"{path}: expected [prompt] with one or more [[prompt.subset]]")
    shared = {key: value for key, value in table.items() if key != "subset"}
    for number, subset in enumerate(subsets):
        yield f"prompt.subset[{number}]", _line(path, f"prompt.subset[{number}]", subset, shared)


def _from_json(path: Path) -> Iterator[tuple[str, str]]:
    text = read_text(path)
    try:
        listed = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(listed, list):
        raise InputError(f"{path}: expected a list of objects with a prompt each")
    for number, entry in enumerate(listed):
        yield f"[{number}]", _line(path, f"[{number}]", entry, {})


def _line(path: Path, place: str, entry: Any, shared: Mapping[str, Any]) -> str:
    """The text line that says the same."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("prompt", shared.get("prompt")), str):
        raise InputError(f"{path}: {place}: expected a table with a text `prompt`")
    values = {**shared, **entry}
    prompt = values.pop("prompt")
    words = [" ".join(prompt.split())]
    for key, value in values.items():
        if key not in _KEYS:
            raise InputError(f"{path}: {place}: unknown {shown(key)}{nearest(key, _KEYS)}")
        if isinstance(value, (Mapping, list)):
            raise InputError(f"{path}: {place}: {key}: expected a text or a number, got {shown(value)}")
        words.append(f"--{_KEYS[key]} {' '.join(str(value).split())}")
    return " ".join(words)

"""Prompt lines in sd-scripts' preview syntax: `a red circle --n blurry --w 768 --h 512 --d 1 --s 28 --l 4 --fs 3`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from ..data.buckets import SIDE_MULTIPLE
from ..errors import InputError
from .reading import nearest, require_text, shown

MAX_SIDE = 2048  # pixels: where the transformer's table of positions ends
MAX_SEED = 2**32 - 1  # what every random generator in use takes


@dataclass(frozen=True)
class PromptLine:
    """One picture to draw.

    Attributes:
        prompt: what to draw; may be empty.
        negative_prompt: `--n`, what to steer away from.
        width, height: `--w`, `--h` in pixels, multiples of 16.
        seed: `--d`; None leaves the choice to who draws.
        steps: `--s`, denoising steps.
        guidance_scale: `--l`, strength of classifier-free guidance; 1 turns it off.
        flow_shift: `--fs`, the scheduler's time shift.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None
    steps: int = 30
    guidance_scale: float = 7.5
    flow_shift: float = 3.0


def _integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """What reads an integer within these bounds; it raises InputError for anything else."""

    def parse(text: str) -> int:
        expected = f"an integer {f'of at least {minimum}' if maximum is None else f'from {minimum} to {maximum}'}"
        try:
            value = int(text)
        except ValueError:
            raise InputError(f"expected {expected}, got {shown(text)}") from None
        if value < minimum or (maximum is not None and value > maximum):
            raise InputError(f"expected {expected}, got {value}")
        return value

    return parse


def _size(text: str) -> int:
    side = _integer(SIDE_MULTIPLE, MAX_SIDE)(text)
    return side - side % SIDE_MULTIPLE


def _number(described: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """What reads a finite number that is allowed; it raises InputError for anything else, as not what is described."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and allowed(value)):
            raise InputError(f"expected {described}, got {shown(text)}")
        return value

    return parse


# letter of the flag: field of PromptLine and the reader of its text
_FLAGS: dict[str, tuple[str, Callable[[str], object]]] = {
    "n": ("negative_prompt", str),
    "w": ("width", _size),
    "h": ("height", _size),
    "d": ("seed", _integer(0, MAX_SEED)),
    "s": ("steps", _integer(1)),
    "l": ("guidance_scale", _number("a number of at least 0", lambda value: value >= 0)),
    "fs": ("flow_shift", _number("a number above 0", lambda value: value > 0)),
}


def parse_prompt_line(text: str) -> PromptLine:
    """Read one prompt line; sizes are floored to multiples of 16.

    Raises:
        InputError: the line is empty or has a line break, a flag is unknown or given twice, a value is missing,
            no number, or out of range. All faults of the line are in the message.
    """
    if not text.strip():
        raise InputError("expected a prompt, got an empty line")
    if len(text.splitlines()) > 1:
        raise InputError("expected one line, got a text with line breaks")
    require_text(text, what=shown(text))
    prompt, *parts = f" {text}".split(" --")
    values: dict[str, object] = {}
    faults = []
    for part in parts:
        flag, _, argument = part.strip().partition(" ")
        if flag not in _FLAGS:
            known = ", ".join(f"--{name}" for name in _FLAGS)
            faults.append(f"unknown --{flag}{nearest(flag, _FLAGS)} (known are {known})")
            continue
        field_name, parse = _FLAGS[flag]
        if field_name in values:
            faults.append(f"--{flag} is given twice")
            continue
        try:
            if not argument.strip():
                raise InputError("has no value")
            values[field_name] = parse(argument.strip())
        except InputError as fault:
            faults.append(f"--{flag}: {fault}")
    if faults:
        raise InputError("; ".join(faults))
    return PromptLine(prompt.strip(), **values)  # type: ignore[arg-type]


def prompt_text(line: PromptLine) -> str:
    """The line that `parse_prompt_line` reads as `line`; flags at their defaults are left out."""
    flags = {field_name: flag for flag, (field_name, _) in _FLAGS.items()}
    words = [line.prompt]
    for declared in fields(PromptLine):
        value = getattr(line, declared.name)
        if declared.name in flags and value != declared.default:
            words.append(f"--{flags[declared.name]} {value}")
    return " ".join(words).strip()

"""From what a user wrote to a checked value, or to a fault that says what was expected and what came."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from enum import Enum
from typing import Any, Final

from ..errors import InputError
from ..texts import escaped
from .options import Kind, Option

_QUOTED = re.compile(r"""\"([^"]*)\"|'([^']*)'""")
_QUOTED_LIST = re.compile(rf"[\[(]\s*(?:{_QUOTED.pattern})\s*(?:,\s*(?:{_QUOTED.pattern})\s*)*,?\s*[\])]")
_BARE_LIST = re.compile(r"\[([^\[\]]*)\]")


class Marker(Enum):
    """Stands where a value would."""

    FAULTY = "a value was given, and its fault is already reported"
    NO_VALUE = "a flag came without its value"


FAULTY: Final = Marker.FAULTY
NO_VALUE: Final = Marker.NO_VALUE


class Faults:
    """Collects every fault, each once, so that a user mends all of them in one go."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, path: str, text: str) -> None:
        """Note a fault of the option at a dotted path."""
        fault = f"{path}: {text}"
        if fault not in self.texts:
            self.texts.append(fault)


def shown(value: object, depth: int = 3) -> str:
    """A value as a user would write it in TOML, shortened; of lists in lists, so many levels."""
    if value is NO_VALUE:
        return "no value"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value if len(value) <= 60 else value[:57] + "..."
        return f'"{escaped(text)}"'
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, (list, tuple)):
        if depth == 0:
            return "[...]"
        items = [shown(item, depth - 1) for item in value[:4]] + ["..."] * (len(value) > 4)
        return f"[{', '.join(items)}]"
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "a number of hundreds of digits"
    return str(value)


def require_text(text: str, *, what: str, is_path: bool = False) -> None:
    """Refuse what cannot be written as UTF-8, tokenized, or given to the system as a name.

    Args:
        text: the value.
        what: it, for the message.
        is_path: whether it is a path, which Linux allows to be of any bytes.

    Raises:
        InputError: it has a NUL character or, unless it is a path, half of a surrogate pair.
    """
    if "\0" in text:
        raise InputError(f"expected a text without NUL characters, got {what}")
    if not is_path and any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(f"expected a text in Unicode, got {what}, which has half of a surrogate pair")


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """`; did you mean "X"?` for the most similar of the names, or nothing where none is similar."""
    close = get_close_matches(name.lower(), list(names), n=1)
    return f'; did you mean "{prefix}{close[0]}"?' if close else ""


def expectation(option: Option) -> str:
    """What an option expects, in words."""
    rules = option.rules
    if rules.choices:
        listed = ", ".join(f'"{choice}"' for choice in rules.choices)
        return listed if len(rules.choices) == 1 else f"one of {listed}"
    if rules.minimum is not None and rules.maximum is not None:
        return f"{option.kind.value} from {rules.minimum} to {rules.maximum}"
    bounds = {"of at least": rules.minimum, "above": rules.above, "of at most": rules.maximum, "below": rules.below}
    words = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    return f"{option.kind.value} {' and '.join(words)}".strip()


def read_value(option: Option, raw: object, path: str, faults: Faults, *, as_text: bool = False) -> Any:
    """The checked value of an option.

    Args:
        raw: what the user wrote: a TOML value, or with `as_text` the text of a flag or of a `key=value`.
        path: where it stands, for messages.
        as_text: whether numbers, booleans and lists come as text.

    Returns:
        The value, or FAULTY after its faults went to `faults`.
    """
    try:
        if as_text:
            raw = _from_text(option, raw)
            if isinstance(raw, str) and option.kind not in (Kind.TEXT, Kind.CUSTOM):
                raise InputError(f"expected {expectation(option)}, got {shown(raw)}")
        if option.kind is Kind.TEXTS:
            return _texts(option, raw, path, faults)
        return _checked(option, raw)
    except InputError as fault:
        faults.add(path, str(fault))
        return FAULTY


def unexpected(option: Option, raw: object) -> InputError:
    """The fault of a value that is not what the option expects."""
    hint = ""
    if isinstance(raw, str) and not option.rules.choices and option.kind not in (Kind.TEXT, Kind.TEXTS):
        bare = _literal(raw)
        hint = "; write it without quotes" if isinstance(bare, (bool, int, float)) else ""
    if isinstance(raw, str) and option.rules.choices:
        hint = nearest(raw, option.rules.choices)
    return InputError(f"expected {expectation(option)}, got {shown(raw)}{hint}")


def _literal(text: str) -> object:
    """The number or boolean that a text spells, else the text itself."""
    word = {"true": True, "false": False}.get(text.strip().lower(), text)
    whole = as_number(text, int) if word is text else word
    return as_number(text, float) if whole is text else whole


def bare_value(raw: object) -> object:
    """What one or more texts on the command line or in a `key=value` spell, for options of unknown type."""
    if isinstance(raw, list):
        return [bare_value(item) for item in raw]
    return _literal(raw) if isinstance(raw, str) else raw


def _from_text(option: Option, raw: object) -> object:
    """The TOML value that a text stands for; an unreadable text stays as it is and fails the type check."""
    if option.kind is Kind.NUMBERS and isinstance(raw, list):
        return [as_number(part, float) for part in raw]
    if not isinstance(raw, str):
        return raw
    if option.kind is Kind.TEXTS:
        return _split(raw)
    if option.kind is Kind.SWITCH:
        value = {"true": True, "false": False}.get(raw.strip().lower())
        return raw if value is None else value
    if option.kind is Kind.INTEGER:
        return as_number(raw, int)
    if option.kind is Kind.NUMBER:
        return as_number(raw, float)
    if option.kind is Kind.INTEGER_OR_NUMBER:
        whole = as_number(raw, int)
        return whole if isinstance(whole, int) else as_number(raw, float)
    return raw


def as_number(text: str, number: Callable[[str], float]) -> object:
    """The number that a text spells for `int` or `float`, else the text itself."""
    try:
        return number(text)
    except ValueError:
        return text


def _split(text: str) -> list[str]:
    """The items of `a,b` or of a list as TOML, JSON or Python write it.

    Backslashes are kept, since the items may be regular expressions; a doubled one, as JSON asks for, is one.
    """
    if _QUOTED_LIST.fullmatch(text.strip()):
        return [(double or single).replace(r"\\", "\\") for double, single in _QUOTED.findall(text)]
    bare = _BARE_LIST.fullmatch(text.strip())  # not a pattern such as "[qk]_proj"
    return [item.strip() for item in (bare[1] if bare else text).split(",")]


def _texts(option: Option, raw: object, path: str, faults: Faults) -> Any:
    if not isinstance(raw, list):
        raise unexpected(option, raw)
    items: list[object] = []
    for index, item in enumerate(raw):
        try:
            if not isinstance(item, str) or not item.strip():
                raise InputError(f"expected a text, got {shown(item)}")
            require_text(item, what=shown(item))
            items.append(option.rules.convert(item) if option.rules.convert else item)
        except InputError as fault:
            faults.add(f"{path}[{index}]", str(fault))
            items.append(FAULTY)
    if FAULTY in items:
        return FAULTY
    if option.rules.check:
        option.rules.check(tuple(items))
    return tuple(items)


def _checked(option: Option, raw: object) -> Any:
    rules = option.rules
    value = raw
    if option.kind is Kind.TEXT:
        value = _text(option, raw)
    elif option.kind is Kind.SWITCH:
        if not isinstance(raw, bool):
            raise unexpected(option, raw)
    elif option.kind is Kind.NUMBERS:
        if not isinstance(raw, list):
            raise unexpected(option, raw)
        value = tuple(float(_number(option, part, raw)) for part in raw)
    elif option.kind is not Kind.CUSTOM:
        value = _number(option, raw, raw)
        value = float(value) if option.kind is Kind.NUMBER else value
    if rules.check and value is not None:
        rules.check(value)
    return rules.convert(value) if rules.convert else value


def _text(option: Option, raw: object) -> str | None:
    rules = option.rules
    if not isinstance(raw, str):
        raise unexpected(option, raw)
    if rules.choices and (raw or not option.optional or "" in rules.synonyms):
        spelled = rules.synonyms.get(raw, raw)
        if spelled in rules.refused:
            raise InputError(f"{shown(raw)} {rules.refused[spelled]}")
        if spelled not in rules.choices:
            raise unexpected(option, raw)
        return spelled
    raw = rules.synonyms.get(raw, raw)
    if not raw.strip():
        if option.optional:
            return None  # "" asks for nothing
        raise unexpected(option, raw)
    require_text(raw, what=shown(raw), is_path=rules.is_path)
    return os.path.expanduser(raw) if rules.is_path else raw


def _number(option: Option, part: object, raw: object) -> int | float:
    """One number within the option's bounds; `raw` is the whole value, for the message."""
    rules = option.rules
    wanted = int if option.kind is Kind.INTEGER else (int, float)
    if isinstance(part, bool) or not isinstance(part, wanted) or not abs(part) <= sys.float_info.max:
        raise unexpected(option, raw)  # also nan, infinities, and integers that no float can hold
    within = (
        (rules.minimum is None or part >= rules.minimum)
        and (rules.above is None or part > rules.above)
        and (rules.maximum is None or part <= rules.maximum)
        and (rules.below is None or part < rules.below)
    )
    if not within:
        raise unexpected(option, raw)
    return part

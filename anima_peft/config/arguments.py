"""Values that are written `key=value` inside a text: arguments of a class, and numbers by pattern of module names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from ..errors import InputError
from .reading import shown

_PLAIN = (bool, int, float, str, tuple, list, type(None))


def read_argument(text: str) -> tuple[str, object]:
    """`key=value` with the value as Python or TOML writes it; what is neither is a text.

    Raises:
        InputError: no key, or a value that is no plain one.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key.isidentifier():
        raise InputError(f'expected "key=value", got {shown(text)}')
    try:
        read = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
    except (ValueError, SyntaxError):
        return key, value
    if not isinstance(read, _PLAIN):
        raise InputError(f"expected numbers, texts, true, false or lists of them, got {shown(text)}")
    return key, read


def read_arguments(texts: Iterable[str]) -> dict[str, object]:
    """All arguments by key.

    Raises:
        InputError: as `read_argument`, or a key is there twice.
    """
    arguments: dict[str, object] = {}
    for text in texts:
        key, value = read_argument(text)
        if key in arguments:
            raise InputError(f"{key} is given twice")
        arguments[key] = value
    return arguments


def read_by_pattern(texts: Iterable[str], number: type[int] | type[float]) -> dict[str, float]:
    """Numbers by regular expression, in their order, from texts `regex=number`.

    Raises:
        InputError: no pattern, a pattern that is there twice or is no regular expression, or not such a number.
    """
    values: dict[str, float] = {}
    for text in texts:
        pattern, _, value = (part.strip() for part in text.rpartition("="))
        try:
            read = number(value)
        except ValueError:
            read = -1
        if not pattern or not 0 <= read < float("inf"):
            kind = "integer" if number is int else "number"
            raise InputError(f'expected "pattern={kind} of at least 0", got {shown(text)}')
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{shown(pattern)} is not a regular expression: {error}") from error
        if pattern in values:
            raise InputError(f"{shown(pattern)} is there twice")
        values[pattern] = read
    return values

"""How an option is declared: a dataclass field whose metadata feeds the flags, `--help`, the checks and the docs."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from functools import cache
from typing import Any


class Kind(Enum):
    """What an option's value is; the text says so to a user."""

    TEXT = "a text"
    SWITCH = "true or false"
    INTEGER = "an integer"
    NUMBER = "a number"
    INTEGER_OR_NUMBER = "an integer or a number"
    TEXTS = "a list of texts"
    NUMBERS = "a list of numbers"
    CUSTOM = "a value"


_KINDS: dict[frozenset[Any], Kind] = {
    frozenset({str}): Kind.TEXT,
    frozenset({bool}): Kind.SWITCH,
    frozenset({int}): Kind.INTEGER,
    frozenset({float}): Kind.NUMBER,
    frozenset({int, float}): Kind.INTEGER_OR_NUMBER,
    frozenset({tuple[str, ...]}): Kind.TEXTS,
    frozenset({tuple[float, ...]}): Kind.NUMBERS,
}


@dataclass(frozen=True)
class Needs:
    """What another option must be for this one to have an effect.

    Attributes:
        option: name of the other option.
        values: its values that give this one an effect; empty stands for every value not in `unless`.
        unless: its values that take this one's effect away.
        hint: what to do instead, as the end of a sentence.
    """

    option: str
    values: tuple[object, ...] = ()
    unless: tuple[object, ...] = ()
    hint: str = ""

    def met_by(self, value: object) -> bool:
        """Whether the other option's value gives this option an effect."""
        return value in self.values if self.values else value not in self.unless


@dataclass(frozen=True)
class Rules:
    """What is known of an option beyond its name, type and default.

    Attributes:
        help: one or two sentences for `--help` and the docs.
        aliases: other names for the same option.
        choices: the only values taken.
        synonyms: other spellings of a choice.
        refused: values that other trainers take, each with the reason and what to use instead.
        minimum, above, maximum, below: bounds of a number; `above` and `below` exclude the bound itself.
        inside: the `key=value` list that this option is written in, e.g. "network_args".
        also_inside: a `key=value` list in which an option with a key of its own may stand as well.
        only_with: conditions on other options without which this one has no effect.
        check: called with the value; raises InputError where it is not wanted.
        convert: called with the value, or with each text of a list; returns what is kept, or raises InputError.
        is_path: a path, in which `~` is the home folder.
        secret: kept out of all that is shown or written.
    """

    help: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    inside: str | None = None
    also_inside: str | None = None
    only_with: tuple[Needs, ...] = ()
    check: Callable[[Any], None] | None = None
    convert: Callable[[Any], object] | None = None
    is_path: bool = False
    secret: bool = False


@dataclass(frozen=True)
class Option:
    """One option: a field of an options dataclass, made ready for reading and for `--help`.

    Attributes:
        name: the field's name, which is also the TOML key and the flag.
        kind: what its value is, from the field's annotation.
        optional: whether it may be left unset (None).
        default: its default, or `dataclasses.MISSING` where it must be given.
        rules: the rest.
    """

    name: str
    kind: Kind
    optional: bool
    default: Any
    rules: Rules

    @property
    def required(self) -> bool:
        """Whether a run cannot start without it."""
        return self.default is MISSING

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its aliases."""
        return (self.name, *self.rules.aliases)


def option(default: Any = MISSING, **rules: Any) -> Any:
    """A dataclass field that declares an option.

    Args:
        default: the value when nothing is given; left out, the option is required.
        **rules: the attributes of `Rules`; `help` is required.
    """
    return field(default=default, metadata={"rules": Rules(**rules)}, repr=not rules.get("secret", False))


@cache
def options_of(cls: type) -> tuple[Option, ...]:
    """The options that a dataclass declares, in its order."""
    annotations = typing.get_type_hints(cls)
    found = []
    for declared in fields(cls):
        kind, optional = _kind_of(annotations[declared.name])
        found.append(Option(declared.name, kind, optional, declared.default, declared.metadata["rules"]))
    return tuple(found)


def _kind_of(annotation: Any) -> tuple[Kind, bool]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = frozenset(typing.get_args(annotation) if union else (annotation,))
    optional = types.NoneType in members
    members -= {types.NoneType}
    if members not in _KINDS and any(typing.get_args(member)[1:] == (Ellipsis,) for member in members):
        return Kind.TEXTS, optional  # a tuple of what `convert` makes from each text
    return _KINDS.get(members, Kind.CUSTOM), optional

"""Finds for every key that a user wrote the option it means, or says why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .options import Option
from .reading import FAULTY, Faults, bare_value, nearest, read_value, shown


@dataclass(frozen=True)
class Given:
    """One value as the user wrote it.

    Attributes:
        name: the key or flag, without section and dashes.
        path: where it stands, for messages, e.g. `datasets[0].subsets[1].num_repeats` or `--learning_rate`.
        raw: the value; a TOML value, or text.
        as_text: whether `raw` is the text of a flag or of a `key=value`.
    """

    name: str
    path: str
    raw: object
    as_text: bool = False


@dataclass(frozen=True)
class Found:
    """A checked value (or FAULTY) and where it came from."""

    value: Any
    path: str


@dataclass(frozen=True)
class Foreign:
    """An option of another trainer that this one does not have.

    Attributes:
        advice: what to do instead.
        accepts: its values that ask for nothing, besides false, 0, "" and an empty list.
    """

    advice: str
    accepts: tuple[object, ...] = ()

    def asks_for_nothing(self, raw: object) -> bool:
        """Whether this value leaves the other trainer doing what ours does anyway."""
        if isinstance(raw, list):
            return all(self.asks_for_nothing(item) for item in raw)
        return raw is None or raw in (False, 0, "") or raw in self.accepts


class Schema:
    """The keys of one place: the train args, a dataset table, or a list of `key=value`."""

    def __init__(
        self,
        options: Iterable[Option],
        foreign: Mapping[str, Foreign] | None = None,
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            options: what may be written here.
            foreign: options of other trainers, by name.
            elsewhere: what to say of keys that have their place elsewhere, by name.
        """
        self.options = {option.name: option for option in options}
        self.by_name = {name: option for option in self.options.values() for name in option.names}
        self.foreign = foreign or {}
        self.elsewhere = elsewhere or {}

    def read(self, givens: Iterable[Given], faults: Faults) -> dict[str, Found]:
        """Every given option by its own name; a faulty one holds FAULTY, its faults are in `faults`."""
        found: dict[str, Found] = {}
        for given in givens:
            option = self.by_name.get(given.name)
            if option is None:
                self._report_stranger(given, faults)
                continue
            value = read_value(option, given.raw, given.path, faults, as_text=given.as_text)
            before = found.get(option.name)
            if before is None or before.value is FAULTY:
                found[option.name] = Found(value, given.path)
            elif value is not FAULTY and value != before.value:
                faults.add(
                    given.path,
                    f"{shown(value)} differs from {before.path} = {shown(before.value)}, "
                    "and both set the same option; keep one of them",
                )
        return found

    def _report_stranger(self, given: Given, faults: Faults) -> None:
        foreign = self.foreign.get(given.name)
        if foreign is not None:
            raw = bare_value(given.raw) if given.as_text else given.raw
            if not foreign.asks_for_nothing(raw):
                faults.add(given.path, f"not supported in this version: {foreign.advice}")
        elif given.name in self.elsewhere:
            faults.add(given.path, self.elsewhere[given.name])
        else:
            prefix = "--" if given.path.startswith("--") else ""
            faults.add(given.path, f"unknown option{nearest(given.name, self.by_name, prefix)}")

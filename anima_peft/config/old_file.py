"""A file whose keys are taken one by one, so that each that nobody takes can be listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .reading import Faults, shown

Key = tuple[str, ...]  # a key with the tables it stands in, such as ("training", "epochs")

NO_COUNTERPART = "has no counterpart"


class OldFile:
    """The keys of a file, of which each is taken or listed as left out."""

    def __init__(self, document: Mapping[str, object], reasons: Mapping[Key, str], faults: Faults) -> None:
        """
        Args:
            document: the parsed TOML.
            reasons: why keys are left out, for those of which it is known.
            faults: takes what is wrong.
        """
        self.values = dict(leaves(document))
        self.faults = faults
        self._taken: set[Key] = set()
        self._reasons = dict(reasons)

    def take(self, key: Key) -> object:
        """The value, or None where it is missing or empty."""
        self._taken.add(key)
        value = self.values.get(key)
        return None if value == "" else value

    def number(self, key: Key) -> int | float | None:
        """A number of at least 0 that a choice depends on."""
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            self.faults.add(path_of(key), f"expected a number of at least 0, got {shown(value)}")
            return None
        return value

    def text(self, key: Key) -> str:
        """A text that a choice depends on, "" where it is missing."""
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            self.faults.add(path_of(key), f"expected a text, got {shown(value)}")
        return value if isinstance(value, str) else ""

    def leave_out(self, key: Key, reason: str) -> None:
        """List a key that was looked at and is not used."""
        if self.take(key) is not None:
            self._taken.discard(key)
            self._reasons[key] = reason

    def drop_table(self, table: str, reason: str) -> None:
        """List every key of a table that was not taken yet."""
        for key in self.values:
            if key[0] == table and key not in self._taken:
                self._reasons[key] = reason

    def left_out(self) -> dict[str, str]:
        """What nobody took, with reasons."""
        kept = {key: value for key, value in self.values.items() if key not in self._taken}
        return {f"{path_of(key)} = {shown(kept[key])}": self._reasons.get(key, NO_COUNTERPART) for key in kept}


def leaves(table: Mapping[str, object], above: Key = ()) -> Iterator[tuple[Key, object]]:
    """Every value with its key; what is in an array stays there."""
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*above, name))
        else:
            yield (*above, name), value


def path_of(key: Key) -> str:
    """The dotted path of a key."""
    return ".".join(key)

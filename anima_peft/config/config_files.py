"""The file that `--config_file` names, in each layout it comes in: train args, or one file with its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from .files import read_toml
from .migration import Migration, Moved, is_root_style, migrate
from .reading import Faults
from .resolved import TRAIN_ARGS_TABLE
from .schema import Given

MIGRATION = "python tools/convert_anima_root_to_kohya.py --input old_root.toml --output_dir converted"


@dataclass(frozen=True)
class ConfigFile:
    """What a file gives.

    Attributes:
        train_args: its train args.
        pictures: its dataset TOML, where it holds one and no other was given.
        paths: where the values of `pictures` stand in the file, for those that stand elsewhere.
        migration: what was made of a file of the older layout.
    """

    train_args: tuple[Given, ...] = ()
    pictures: Mapping[str, object] | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    migration: Migration | None = None

    def notes(self) -> Iterator[str]:
        """What a user should know of how the file was read."""
        if self.migration is not None:
            yield f"The file has the older one-file layout and was read as such. To convert it: {MIGRATION}"
            yield from self.migration.decisions
            yield from (f"{key}: left out; it {reason}." for key, reason in self.migration.left_out.items())


def read_config_file(
    path: Path, other_pictures: bool, without_effect: Callable[[Migration], None], faults: Faults
) -> ConfigFile | None:
    """Read the file that `--config_file` names.

    Args:
        path: the file.
        other_pictures: whether a dataset TOML is given beside it, to which pictures in this file yield.
        without_effect: takes what has no effect out of a file of the older layout, where that was no fault.
        faults: takes what is wrong.

    Returns:
        What it holds, or None where it cannot be read or is no such file.
    """
    try:
        document = read_toml(path)
    except InputError as fault:
        faults.texts.append(str(fault))
        return None
    if is_root_style(document):
        migration = migrate(document, faults, with_pictures=not other_pictures)
        without_effect(migration)
        return ConfigFile(
            tuple(given_of(moved) for moved in migration.train_args),
            None if other_pictures else migration.dataset_document(),
            migration.dataset_paths(),
            migration,
        )
    if TRAIN_ARGS_TABLE in document and "datasets" in document:
        pictures: dict[str, object] = {key: document.pop(key) for key in ("general", "datasets") if key in document}
        return ConfigFile(tuple(_flattened(document)), None if other_pictures else pictures)
    if "datasets" in document:
        faults.add("datasets", f"belongs into the dataset TOML; {path} was given as the train args")
        return None
    return ConfigFile(tuple(_flattened(document)))


def given_of(moved: Moved) -> Given:
    """A converted value as one that the user gave."""
    return Given(moved.name, moved.path, moved.value)


def _flattened(document: Mapping[str, object]) -> Iterator[Given]:
    """Top-level keys, and those of sections, whose names sd-scripts' users choose freely."""
    for key, value in document.items():
        if isinstance(value, dict):
            yield from (Given(inner, f"{key}.{inner}", raw) for inner, raw in value.items())
        else:
            yield Given(key, key, value)

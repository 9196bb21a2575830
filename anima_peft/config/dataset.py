"""sd-scripts' dataset TOML ([general], [[datasets]], [[datasets.subsets]]) into the specs of `anima_peft.data`."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..data.buckets import SIDE_MULTIPLE
from ..data.specs import CaptionSpec, DatasetSpec, SubsetSpec
from . import foreign
from .captions import CAPTION_OPTIONS, unheeded
from .checks import missing_effect, value_of
from .dataset_options import BOUNDED_BUCKETS, BatchKeys, DatasetKeys, PlaceKeys, SubsetKeys
from .options import Option, options_of
from .reading import FAULTY, Faults, nearest, shown
from .resolved import Line
from .schema import Found, Given, Schema

_DATASET_OPTIONS = (*options_of(DatasetKeys), *options_of(BatchKeys))
_SUBSET_OPTIONS = options_of(SubsetKeys)
_PLACE_OPTIONS = options_of(PlaceKeys)
_PATHS = ("image_dir", "metadata_file", "conditioning_data_dir")
_SUBSETS_BELONG = {"subsets": "belongs into a [[datasets]] table, as [[datasets.subsets]]"}
_PLACE_BELONGS = {option.name: "belongs into [[datasets.subsets]]" for option in _PLACE_OPTIONS}
_ALL_OPTIONS = {option.name: option for option in (*_DATASET_OPTIONS, *_SUBSET_OPTIONS, *_PLACE_OPTIONS)}

_GENERAL = Schema(
    (*_DATASET_OPTIONS, *_SUBSET_OPTIONS), foreign.CAPTION_AND_PICTURE_OPTIONS, {**_PLACE_BELONGS, **_SUBSETS_BELONG}
)
_DATASET = Schema((*_DATASET_OPTIONS, *_SUBSET_OPTIONS), foreign.CAPTION_AND_PICTURE_OPTIONS, _PLACE_BELONGS)
_SUBSET = Schema(
    (*_SUBSET_OPTIONS, *_PLACE_OPTIONS),
    foreign.CAPTION_AND_PICTURE_OPTIONS,
    {name: "belongs into [[datasets]] or [general]" for option in _DATASET_OPTIONS for name in option.names},
)

Levels = ChainMap[str, Found]  # what holds for a dataset or subset: its own keys first, the train args last


@dataclass(frozen=True)
class Datasets:
    """What a dataset TOML says.

    Attributes:
        specs: the datasets.
        warnings: what is allowed and probably not meant.
        levels: of each dataset its own keys and those of its subsets.
    """

    specs: tuple[DatasetSpec, ...] = ()
    warnings: tuple[str, ...] = ()
    levels: tuple[tuple[Levels, tuple[Levels, ...]], ...] = ()

    def lines(self) -> Iterator[tuple[list[Line], list[list[Line]]]]:
        """Each dataset's options and those of its subsets, with values and origins."""
        for levels, subsets in self.levels:
            own = _lines(_DATASET_OPTIONS, levels)
            yield own, [_lines((*_PLACE_OPTIONS, *_SUBSET_OPTIONS), subset) for subset in subsets]


def _lines(options: tuple[Option, ...], levels: Levels) -> list[Line]:
    fallback = levels.maps[-1]
    lines = []
    for declared in options:
        given, origin = levels.get(declared.name), "default"
        if given is not None:
            file = "train args" if fallback.get(declared.name) is given else "dataset TOML"
            origin = origin_of(declared.name, given, file)
        lines.append((declared, value_of(declared, levels), origin))
    return lines


def origin_of(name: str, given: Found, file: str) -> str:
    """Where the value of the option of this name was given, for people."""
    source = "command line" if given.path.startswith("--") else file
    return source if given.path.removeprefix("--") == name else f"{source}: {given.path}"


def read_datasets(
    document: Mapping[str, object],
    fallback: Mapping[str, Found],
    faults: Faults,
    renamed: Mapping[str, str] | None = None,
) -> Datasets:
    """The datasets of a dataset TOML.

    Args:
        document: the parsed TOML.
        fallback: dataset keys from the train args and the command line, for what the TOML leaves open.
        faults: takes every fault found; where it got any, the specs returned are not to be used.
        renamed: where values stand in the user's file if the document was made from another layout.
    """
    renamed = renamed or {}
    read = partial(_read_table, renamed=renamed, faults=faults)
    for key in (key for key in document if key not in ("general", "datasets")):
        belongs = "; it belongs into [general] or [[datasets]]"
        hint = belongs if key in _GENERAL.by_name else nearest(key, ("general", "datasets"))
        faults.add(key, f"unknown in a dataset TOML, which holds [general] and [[datasets]]{hint}")
    general_table = document.get("general", {})
    if not isinstance(general_table, dict):
        faults.add("general", f"expected a table, written [general], got {shown(general_table)}")
        general_table = {}
    base: Levels = ChainMap(read(_GENERAL, general_table, "general"), dict(fallback))

    datasets: list[Levels] = []
    subsets: list[Levels] = []
    read_levels = []
    specs = []
    for path, table in _tables(document, "datasets", "datasets", faults):
        levels = base.new_child(read(_DATASET, table, path))
        below = [
            levels.new_child(read(_SUBSET, subset, subset_path))
            for subset_path, subset in _tables(table, "subsets", f"{path}.subsets", faults)
        ]
        _check_places(below, path, renamed, faults)
        _check_geometry(levels, path, faults)
        datasets.append(levels)
        subsets.extend(below)
        read_levels.append((levels, tuple(below)))
        if not faults.texts:
            specs.append(_dataset_spec(levels, below))
    warnings = [
        *_check_levels(datasets, subsets, faults),
        *_squeeze_warnings(datasets),
        *_check_fallback(fallback, datasets, subsets, faults),
    ]
    return Datasets(tuple(specs), tuple(warnings), tuple(read_levels))


def _place(name: str, table: str, renamed: Mapping[str, str]) -> str:
    """Where a key stands in the user's file."""
    return renamed.get(f"{table}.{name}", f"{table}.{name}")


def _tables(
    table: Mapping[str, object], key: str, path: str, faults: Faults
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Each table of an array of tables with its path; at least one is expected."""
    array = table.get(key, [])
    if not isinstance(array, list) or not all(isinstance(item, dict) for item in array) or not array:
        header = f"[[{'datasets.subsets' if key == 'subsets' else key}]]"
        got = "none" if not array else shown(array)
        faults.add(path, f"expected at least one table, written {header}, got {got}")
        return
    for index, item in enumerate(array):
        yield f"{path}[{index}]", item


def _read_table(
    schema: Schema, table: Mapping[str, object], path: str, renamed: Mapping[str, str], faults: Faults
) -> dict[str, Found]:
    own_arrays = {"subsets"} if schema is _DATASET else set()
    givens = (Given(key, _place(key, path, renamed), raw) for key, raw in table.items() if key not in own_arrays)
    return schema.read(givens, faults)


def _values(options: tuple[Option, ...], levels: Levels) -> dict[str, Any]:
    return {option.name: value_of(option, levels) for option in options}


def _dataset_spec(levels: Levels, subsets: list[Levels]) -> DatasetSpec:
    return DatasetSpec(subsets=tuple(_subset_spec(subset) for subset in subsets), **_values(_DATASET_OPTIONS, levels))


def _subset_spec(levels: Levels) -> SubsetSpec:
    values = _values((*_SUBSET_OPTIONS, *_PLACE_OPTIONS), levels)
    captions = CaptionSpec(**{option.name: values.pop(option.name) for option in CAPTION_OPTIONS})
    paths = {name: Path(values[name]) for name in _PATHS if values[name] is not None}
    return SubsetSpec(**{**values, **paths}, captions=captions)


def _check_places(subsets: list[Levels], path: str, renamed: Mapping[str, str], faults: Faults) -> None:
    """Report subsets without pictures, and those of a dataset that name the same pictures."""
    seen: dict[tuple[object, object], int] = {}
    for index, levels in enumerate(subsets):
        pictures = tuple(value_of(_ALL_OPTIONS[name], levels) for name in ("image_dir", "metadata_file"))
        if FAULTY in pictures:
            continue
        if pictures == (None, None):
            faults.add(
                _place("image_dir", f"{path}.subsets[{index}]", renamed),
                f"required, but not given. {_ALL_OPTIONS['image_dir'].rules.help}",
            )
        elif pictures in seen:
            faults.add(
                f"{path}.subsets[{index}]",
                f"names the same pictures as {path}.subsets[{seen[pictures]}]; sd-scripts ignores the second. Raise "
                "num_repeats of one, or put the other into a [[datasets]] of its own",
            )
        else:
            seen[pictures] = index


def _check_geometry(levels: Levels, path: str, faults: Faults) -> None:
    """Report sizes that do not fit each other."""
    values = _values(_DATASET_OPTIONS, levels)
    if FAULTY in values.values():
        return  # reported already; what follows from it would only confuse

    def fault(key: str, text: str) -> None:
        faults.add(levels[key].path if key in levels else f"{path}.{key}", text)

    sides, steps = values["resolution"], values["bucket_reso_steps"]
    low, high = values["min_bucket_reso"], values["max_bucket_reso"]
    if not values["enable_bucket"]:
        if any(side % SIDE_MULTIPLE for side in sides):
            fault("resolution", f"expected multiples of {SIDE_MULTIPLE} where enable_bucket is off, got {shown(sides)}")
        return
    if values["bucket_no_upscale"]:
        if min(sides) < steps:
            fault("resolution", f"expected at least bucket_reso_steps = {steps}, got {shown(sides)}")
        return
    for key, side in (("min_bucket_reso", low), ("max_bucket_reso", high)):
        if side % steps:
            fault(key, f"expected a multiple of bucket_reso_steps = {steps}, got {side}")
    if low > high:
        fault("min_bucket_reso", f"expected at most max_bucket_reso = {high}, got {low}")
    if min(sides) < low:
        fault("resolution", f"expected at least min_bucket_reso = {low}, got {shown(sides)}; lower min_bucket_reso")
    if max(sides) > high:
        fault("resolution", f"expected at most max_bucket_reso = {high}, got {shown(sides)}; raise max_bucket_reso")


def _check_levels(datasets: list[Levels], subsets: list[Levels], faults: Faults) -> list[str]:
    """Report options that nothing heeds; one in [general] may serve some datasets or subsets and not others.

    Returns:
        Warnings: sd-scripts' documentation sets bounds of buckets beside bucket_no_upscale, where they do nothing.
    """
    without: dict[str, str] = {}
    harmless: dict[str, str] = {}
    heeded: set[str] = set()
    enable_bucket = _ALL_OPTIONS["enable_bucket"]
    places = [(_DATASET_OPTIONS, dataset) for dataset in datasets]
    places += [((*_SUBSET_OPTIONS, *_PLACE_OPTIONS), subset) for subset in subsets]
    for options, levels in places:
        texts = dict(unheeded(_ALL_OPTIONS, levels)) if options is not _DATASET_OPTIONS else {}
        for declared in options:
            given = levels.get(declared.name)
            if given is None or given.value is FAULTY or given.value == declared.default:
                continue
            text = texts.get(declared.name) or missing_effect(declared, _ALL_OPTIONS, levels)
            if not text:
                heeded.add(given.path)
            elif BOUNDED_BUCKETS in declared.rules.only_with and value_of(enable_bucket, levels) is True:
                harmless[given.path] = text
            else:
                without[given.path] = text
    for path in sorted(without.keys() - heeded):
        faults.add(path, without[path])
    return [f"{path} {harmless[path]}." for path in sorted(harmless.keys() - heeded)]


def _check_fallback(
    fallback: Mapping[str, Found], datasets: list[Levels], subsets: list[Levels], faults: Faults
) -> list[str]:
    """Report dataset keys of the train args that every dataset overrides; returns warnings for harmless ones."""
    warnings = []
    for name, given in fallback.items():
        places = subsets if name in _SUBSET.options else datasets
        values = [place[name].value for place in places]
        if given.value is FAULTY or not places or given.value in values or FAULTY in values:
            continue
        text = f"has no effect, because the dataset TOML sets {places[0][name].path} = {shown(places[0][name].value)}"
        if given.value != _ALL_OPTIONS[name].default:
            faults.add(given.path, f"{text}; change it there")
        elif given.path.startswith("--"):
            warnings.append(f"{given.path} {shown(given.value)} {text}.")
    return warnings


def _squeeze_warnings(datasets: list[Levels]) -> Iterator[str]:
    for levels in datasets:
        values = _values(_DATASET_OPTIONS, levels)
        if FAULTY in values.values() or not values["enable_bucket"] or values["bucket_no_upscale"]:
            continue
        side, high, steps = max(values["resolution"]), values["max_bucket_reso"], values["bucket_reso_steps"]
        if side == high:
            roomy = -(-side * 3 // 2 // steps) * steps
            yield (
                f"{levels['resolution'].path if 'resolution' in levels else 'resolution'} = {side} is as large as "
                f"max_bucket_reso = {high}, so every picture that is not square is trained smaller; "
                f"set max_bucket_reso = {roomy}."
            )

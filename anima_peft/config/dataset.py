"""sd-scripts' dataset TOML ([general], [[datasets]], [[datasets.subsets]]) into the specs of `anima_peft.data`."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..data.buckets import SIDE_MULTIPLE
from ..data.specs import DatasetSpec, SubsetSpec
from ..errors import InputError
from . import foreign
from .checks import check_required, missing_effect, value_of
from .options import Needs, Option, option, options_of
from .reading import FAULTY, Faults, as_number, nearest, shown
from .resolved import Line
from .schema import Found, Given, Schema

LONGEST_SIDE = 65536  # pixels; beyond any picture, so a slip of the keyboard


def parse_resolution(raw: object) -> tuple[int, int]:
    """(width, height) in pixels from `1024`, `[1024, 768]`, `"1024"` or `"1024,768"`.

    Raises:
        InputError: it is none of these, or a side is out of range.
    """
    if isinstance(raw, str):
        sides = [as_number(side, int) for side in raw.strip(" []()").split(",")]
    else:
        sides = raw if isinstance(raw, list) else [raw]
    whole = [side for side in sides if isinstance(side, int) and SIDE_MULTIPLE <= side <= LONGEST_SIDE]
    if len(whole) != len(sides) or len(whole) not in (1, 2):
        raise InputError(
            f"expected a side or [width, height] in pixels from {SIDE_MULTIPLE} to {LONGEST_SIDE}, got {shown(raw)}"
        )
    return whole[0], whole[-1]


def _with_dot(extension: str) -> str:
    suffix = extension if extension.startswith(".") else f".{extension}"
    if suffix == "." or set(suffix) & set('/\\<>:"|?*'):
        raise InputError(f'expected the suffix of caption files such as ".txt", got {shown(extension)}')
    return suffix


def _check_steps(steps: int) -> None:
    if steps % SIDE_MULTIPLE:
        raise InputError(f"expected a multiple of {SIDE_MULTIPLE}, got {steps}")


_BUCKETED = Needs("enable_bucket", unless=(False,), hint="set enable_bucket = true or remove it")
_BOUNDED = Needs("bucket_no_upscale", unless=(True,))


@dataclass(frozen=True, kw_only=True)
class DatasetKeys:
    """Pictures, where the dataset TOML does not say: size and buckets."""

    resolution: tuple[int, int] = option(
        DatasetSpec.resolution, convert=parse_resolution, help="Training size in pixels: a side, or width,height."
    )
    enable_bucket: bool = option(DatasetSpec.enable_bucket, help="Group pictures by aspect ratio instead of cropping.")
    min_bucket_reso: int = option(
        DatasetSpec.min_bucket_reso,
        minimum=SIDE_MULTIPLE,
        maximum=LONGEST_SIDE,
        only_with=(_BUCKETED, _BOUNDED),
        help="Shortest side of a bucket in pixels.",
    )
    max_bucket_reso: int = option(
        DatasetSpec.max_bucket_reso,
        minimum=SIDE_MULTIPLE,
        maximum=LONGEST_SIDE,
        only_with=(_BUCKETED, _BOUNDED),
        help="Longest side of a bucket in pixels.",
    )
    bucket_reso_steps: int = option(
        DatasetSpec.bucket_reso_steps,
        minimum=SIDE_MULTIPLE,
        maximum=LONGEST_SIDE,
        check=_check_steps,
        only_with=(_BUCKETED,),
        help=f"Sides of a bucket are multiples of this; itself a multiple of {SIDE_MULTIPLE}.",
    )
    bucket_no_upscale: bool = option(
        DatasetSpec.bucket_no_upscale, only_with=(_BUCKETED,), help="Never enlarge a picture to fill a bucket."
    )


@dataclass(frozen=True, kw_only=True)
class BatchKeys:
    """Pictures: the batch size, which the train args call train_batch_size."""

    batch_size: int = option(DatasetSpec.batch_size, minimum=1, help="Pictures per device and step.")


@dataclass(frozen=True, kw_only=True)
class SubsetKeys:
    """Pictures, where the dataset TOML does not say: captions and repeats."""

    num_repeats: int = option(
        SubsetSpec.num_repeats,
        aliases=("dataset_repeats",),
        minimum=1,
        help="How often each picture is seen in an epoch.",
    )
    caption_extension: str = option(
        SubsetSpec.caption_extension,
        aliases=("caption_extention",),  # sd-scripts takes its old misspelling too
        convert=_with_dot,
        help="Suffix of the caption files.",
    )
    class_tokens: str | None = option(SubsetSpec.class_tokens, help="Caption of a picture that has no caption file.")
    flip_aug: bool = option(SubsetSpec.flip_aug, help="Also train on mirrored pictures.")


@dataclass(frozen=True, kw_only=True)
class PlaceKeys:
    """Pictures: where they are, in [[datasets.subsets]]."""

    image_dir: str = option(is_path=True, help="Folder of the pictures.")


_DATASET_OPTIONS = (*options_of(DatasetKeys), *options_of(BatchKeys))
_SUBSET_OPTIONS = options_of(SubsetKeys)
_PLACE_OPTIONS = options_of(PlaceKeys)
_SUBSETS_BELONG = {"subsets": "belongs into a [[datasets]] table, as [[datasets.subsets]]"}
_PLACE_BELONGS = {"image_dir": "belongs into [[datasets.subsets]]"}

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
        for index, subset_levels in enumerate(below):
            place = partial(_place, table=f"{path}.subsets[{index}]", renamed=renamed)
            check_required(options_of(PlaceKeys), subset_levels, faults, place)
        _check_geometry(levels, path, faults)
        datasets.append(levels)
        subsets.extend(below)
        read_levels.append((levels, tuple(below)))
        if not faults.texts:
            specs.append(_dataset_spec(levels, below))
    _check_bucket_effects(datasets, faults)
    warnings = [*_squeeze_warnings(datasets), *_check_fallback(fallback, datasets, subsets, faults)]
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
    folders = (_values((*_SUBSET_OPTIONS, *_PLACE_OPTIONS), subset) for subset in subsets)
    specs = tuple(SubsetSpec(**{**folder, "image_dir": Path(folder["image_dir"])}) for folder in folders)
    return DatasetSpec(subsets=specs, **_values(_DATASET_OPTIONS, levels))


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


def _check_bucket_effects(datasets: list[Levels], faults: Faults) -> None:
    """Report bucket keys that no dataset heeds; one in [general] may serve some datasets and not others."""
    options = {option.name: option for option in _DATASET_OPTIONS}
    without: dict[str, str] = {}
    heeded: set[str] = set()
    for levels in datasets:
        for name in options.keys() & levels.keys():
            given = levels[name]
            if given.value is FAULTY or given.value == options[name].default:
                continue
            text = missing_effect(options[name], options, levels)
            if text:
                without[given.path] = text
            else:
                heeded.add(given.path)
    for path in sorted(without.keys() - heeded):
        faults.add(path, without[path])


def _check_fallback(
    fallback: Mapping[str, Found], datasets: list[Levels], subsets: list[Levels], faults: Faults
) -> list[str]:
    """Report dataset keys of the train args that every dataset overrides; returns warnings for harmless ones."""
    warnings = []
    options = {option.name: option for option in (*_DATASET_OPTIONS, *_SUBSET_OPTIONS)}
    for name, given in fallback.items():
        places = subsets if name in _SUBSET.options else datasets
        values = [place[name].value for place in places]
        if given.value is FAULTY or not places or given.value in values or FAULTY in values:
            continue
        text = f"has no effect, because the dataset TOML sets {places[0][name].path} = {shown(places[0][name].value)}"
        if given.value != options[name].default:
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

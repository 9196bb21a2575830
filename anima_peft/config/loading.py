"""Command line, train args TOML and dataset TOML into one checked configuration, with all faults in one report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .._version import __version__
from ..data.specs import DatasetSpec
from ..errors import InputError
from . import checks, foreign
from .command_line import FileOptions, help_text, make_parser, read_flags
from .config_files import MIGRATION, ConfigFile, given_of, read_config_file
from .dataset import Datasets, origin_of, read_datasets
from .dataset_options import BatchKeys, DatasetKeys, SubsetKeys
from .files import read_toml
from .memory import apply_preset, check_memory, set_by_preset
from .migration import Migration
from .network import ARGUMENT_LISTS
from .options import Kind, Option, Rules, options_of
from .picture_loss import check_picture_loss
from .prompt_files import read_prompts
from .prompts import PromptLine
from .reading import FAULTY, Faults, shown
from .resolved import Line, compact, resolved_text
from .schema import Found, Given, Schema
from .trackers import read_tracker_arguments
from .train import DEFAULT_TRAIN_STEPS, TrainOptions
from .training_checks import check_training

GROUPS: Mapping[str, type] = typing.get_type_hints(TrainOptions)
OPTIONS = {option.name: option for group in GROUPS.values() for option in options_of(group)}
_LISTS = {
    name: Option(name, Kind.TEXTS, optional=False, default=(), rules=Rules(help=text))
    for name, text in ARGUMENT_LISTS.items()
}
_DATASET_FALLBACKS = (*options_of(DatasetKeys), *options_of(SubsetKeys))
_FLAT = (*(option for option in OPTIONS.values() if option.rules.inside is None), *_LISTS.values())

_INSIDE = {
    name: f'belongs into {option.rules.inside}: {option.rules.inside} = ["{name}=..."]'
    for name, option in OPTIONS.items()
    if option.rules.inside
}
_FLAGS = Schema((*options_of(FileOptions), *_FLAT, *_DATASET_FALLBACKS), foreign.TRAIN_OPTIONS, _INSIDE)
_TRAIN_ARGS = Schema(
    (option for option in _FLAGS.options.values() if option.name not in ("config_file", "print_config")),
    foreign.TRAIN_OPTIONS,
    {
        **_INSIDE,
        "config_file": "belongs on the command line",
        "print_config": "belongs on the command line",
        "batch_size": "belongs into the dataset TOML; here it is train_batch_size",
        **dict.fromkeys(
            ("image_dir", "metadata_file", "conditioning_data_dir", "is_reg"),
            "belongs into the dataset TOML, which --dataset_config names",
        ),
    },
)
_ARGUMENTS = {
    name: Schema(
        (o for o in OPTIONS.values() if name in (o.rules.inside, o.rules.also_inside)), foreign.ARGUMENTS[name]
    )
    for name in _LISTS
}


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration.

    Attributes:
        train: the options of the run.
        previews: the prompts of `sample_prompts`.
        wandb: arguments of `wandb.init` from the file of `log_tracker_config`.
        datasets: what it trains on.
        warnings: what is allowed and probably not meant, one sentence each.
        resolved: the whole configuration as TOML, with a comment on each line that says where the value comes from.
        summary: what differs from the defaults, as JSON, without the folders of paths.
        print_config: whether `resolved` is all that is wanted, and no run.
    """

    train: TrainOptions
    previews: tuple[PromptLine, ...]
    wandb: Mapping[str, Any]
    datasets: tuple[DatasetSpec, ...]
    warnings: tuple[str, ...]
    resolved: str
    summary: str
    print_config: bool


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of all training flags, for parsing and for showing the help.

    Args:
        prog: name of the command in the help text; None takes it from `sys.argv`.
    """
    groups = [(cls.__doc__ or "", _flags_of(cls)) for cls in (FileOptions, *GROUPS.values(), DatasetKeys, SubsetKeys)]
    return make_parser(groups, foreign.TRAIN_OPTIONS, prog)


def load(argv: Sequence[str], prog: str | None = None) -> RunConfig:
    """Read the configuration that a command line names; nothing is created and no other file is looked at.

    Command line beats train args TOML beats defaults; keys of the dataset TOML beat their fallbacks in both.

    Args:
        argv: the arguments after the command's name.
        prog: name of the command in the help text.

    Raises:
        InputError: anything is wrong with any of the three sources; all faults are in the one message.
        SystemExit: `--help` was asked for.
    """
    if any(word == "--config" or word.startswith("--config=") for word in argv):
        raise InputError(
            "--config is gone: train args and pictures are two files now, --config_file and --dataset_config.\n"
            f"Convert an old file with: {MIGRATION}"
        )
    faults = Faults()
    found, file = _read(build_parser(prog), argv, faults)
    config_file, dataset_config = _path(found.get("config_file")), _path(found.get("dataset_config"))
    memory = apply_preset(OPTIONS, found)
    _check(found, file, faults)
    datasets = Datasets()
    if dataset_config is not None:
        datasets = _datasets(dataset_config, found, faults)
    elif file is not None and file.pictures is not None:
        dataset_config = config_file
        datasets = read_datasets(file.pictures, _dataset_fallback(found), faults, file.paths)
    if datasets.specs:
        check_picture_loss(found, datasets.specs, faults)
    previews, wandb = _previews(found, faults), read_tracker_arguments(found, faults)
    if faults.texts or file is None or dataset_config is None:
        raise _report(faults, config_file, dataset_config)
    train = _train_options(found)
    lines = _train_lines(train, found)
    return RunConfig(
        train,
        previews,
        wandb,
        datasets.specs,
        (*file.notes(), *memory, *datasets.warnings),
        resolved_text(_heading(config_file, dataset_config), lines, datasets.lines()),
        _summary(lines, datasets),
        "print_config" in found and found["print_config"].value is True,
    )


def _read(
    parser: argparse.ArgumentParser, argv: Sequence[str], faults: Faults
) -> tuple[dict[str, Found], ConfigFile | None]:
    """Every option that the command line or the train args give, and the file of these; None if it cannot be read."""
    flags = _FLAGS.read(read_flags(parser, argv, faults), faults)
    path = _path(flags.get("config_file"))
    file: ConfigFile | None = ConfigFile()
    if path is not None:
        without_effect = partial(take_out_what_has_no_effect, flags=flags)
        file = read_config_file(path, "dataset_config" in flags, without_effect, faults)
    found = {**({} if file is None else _TRAIN_ARGS.read(file.train_args, faults)), **flags}
    _merge(found, _arguments(found, faults), faults)
    return found, file


def _check(found: Mapping[str, Found], file: ConfigFile | None, faults: Faults) -> None:
    """Report what options say of each other, and those that are missing."""
    if file is not None:  # what an unreadable file would have given is not missing
        files = [option for option in options_of(FileOptions) if file.pictures is None]
        checks.check_required((*files, *OPTIONS.values()), found, faults)
        checks.check_model_parts(OPTIONS, found, faults)
        checks.check_network(OPTIONS, found, faults)
        checks.check_hub_places(OPTIONS, found, faults)
    checks.check_effects(OPTIONS.values(), found, faults)
    check_training(OPTIONS, found, faults)
    check_memory(OPTIONS, found, faults)


def take_out_what_has_no_effect(migration: Migration, flags: Mapping[str, Found] | None = None) -> None:
    """Move what the older trainer took and did not heed from the train args to the list of what is left out.

    Args:
        migration: changed in place.
        flags: what is given on the command line beside the file.
    """
    faults = Faults()  # are reported when the values are read for good
    found = {**_TRAIN_ARGS.read((given_of(moved) for moved in migration.train_args), faults), **(flags or {})}
    found.update(_arguments(found, faults))
    for option in OPTIONS.values():
        given = found.get(option.name)
        if given is not None and given.value is not FAULTY and given.value != option.default:
            reason = checks.missing_effect(option, OPTIONS, found)
            if reason:
                migration.leave_out(given.path, reason.partition(";")[0])


def _flags_of(cls: type) -> list[Option]:
    """The options of a group that have a flag; a `key=value` list stands in for those inside it."""
    shown_options: dict[str, Option] = {}
    for option in options_of(cls):
        name = option.rules.inside
        if name is None:
            shown_options[option.name] = option
            continue
        inner = [o for o in options_of(cls) if o.rules.inside == name]
        text = " ".join([ARGUMENT_LISTS[name], *(f"{o.name}: {help_text(o)}" for o in inner)])
        shown_options[name] = dataclasses.replace(_LISTS[name], rules=Rules(help=text))
    return list(shown_options.values())


def _path(found: Found | None) -> Path | None:
    return Path(found.value) if found is not None and isinstance(found.value, str) else None


def _arguments(found: Mapping[str, Found], faults: Faults) -> dict[str, Found]:
    """The options written inside `key=value` lists."""
    result: dict[str, Found] = {}
    for name, schema in _ARGUMENTS.items():
        listed = found.get(name)
        if listed is None or listed.value is FAULTY:
            continue
        givens = []
        for index, text in enumerate(listed.value):
            key, equals, value = (part.strip() for part in text.partition("="))
            if equals and key:
                givens.append(Given(key, f"{listed.path}.{key}", value, as_text=True))
            else:
                faults.add(f"{listed.path}[{index}]", f'expected "key=value", got {shown(text)}')
        result.update(schema.read(givens, faults))
    return result


def _merge(found: dict[str, Found], arguments: Mapping[str, Found], faults: Faults) -> None:
    """Add options from `key=value` lists to those with a key of their own; of two sources the command line wins."""
    for name, argument in arguments.items():
        own = found.get(name)
        if own is None or own.value == argument.value or argument.path.startswith("--") > own.path.startswith("--"):
            found[name] = argument
        elif argument.path.startswith("--") == own.path.startswith("--"):
            faults.add(
                argument.path,
                f"{shown(argument.value)} differs from {own.path} = {shown(own.value)}, "
                "and both set the same option; keep one of them",
            )


def _previews(found: Mapping[str, Found], faults: Faults) -> tuple[PromptLine, ...]:
    """The prompts of the file that `sample_prompts` names."""
    path = _path(found.get("sample_prompts"))
    if path is None:
        return ()
    try:
        return read_prompts(path)
    except InputError as fault:
        faults.add(found["sample_prompts"].path, str(fault))
        return ()


def _datasets(path: Path, found: Mapping[str, Found], faults: Faults) -> Datasets:
    try:
        document = read_toml(path)
    except InputError as fault:
        faults.texts.append(str(fault))
        return Datasets()
    if "datasets" not in document and document.keys() & OPTIONS.keys():
        faults.add("datasets", f"missing, and {path}, which was given as the dataset TOML, holds train args")
        return Datasets()
    return read_datasets(document, _dataset_fallback(found), faults)


def load_datasets(path: Path) -> tuple[tuple[DatasetSpec, ...], tuple[str, ...]]:
    """The datasets of a dataset TOML on its own, without train args, and warnings.

    Raises:
        InputError: it is not valid; all faults are in the one message.
    """
    faults = Faults()
    datasets = _datasets(path, {}, faults)
    if faults.texts:
        raise _report(faults, None, path)
    return datasets.specs, datasets.warnings


def _dataset_fallback(found: Mapping[str, Found]) -> dict[str, Found]:
    fallback = {option.name: found[option.name] for option in _DATASET_FALLBACKS if option.name in found}
    if "train_batch_size" in found:
        fallback[options_of(BatchKeys)[0].name] = found["train_batch_size"]
    return fallback


def _train_options(found: Mapping[str, Found]) -> TrainOptions:
    values = {name: checks.value_of(option, found) for name, option in OPTIONS.items()}
    if values["max_train_steps"] is None and values["max_train_epochs"] is None:
        values["max_train_steps"] = DEFAULT_TRAIN_STEPS
    values["network_alpha"] = values["network_alpha"] or float(values["network_dim"])
    return TrainOptions(
        **{
            group: cls(**{option.name: values[option.name] for option in options_of(cls)})
            for group, cls in GROUPS.items()
        }
    )


def _train_lines(train: TrainOptions, found: Mapping[str, Found]) -> list[tuple[str, list[Line]]]:
    return [
        (
            (cls.__doc__ or "").rstrip("."),
            [(o, getattr(getattr(train, group), o.name), _origin(o, found)) for o in options_of(cls)],
        )
        for group, cls in GROUPS.items()
    ]


def _origin(option: Option, found: Mapping[str, Found]) -> str:
    given = found.get(option.name)
    if given is not None:
        return given.path if set_by_preset(given) else origin_of(option.name, given, "train args")
    return "default" if not checks.missing_effect(option, OPTIONS, found) else "default, without effect in this run"


def _heading(config_file: Path | None, dataset_config: Path) -> list[str]:
    return [
        f"anima_peft {__version__}: every option of a run, and where its value comes from",
        f"train args: {config_file or 'none'}",
        f"dataset: {dataset_config}",
    ]


def _summary(lines: list[tuple[str, list[Line]]], datasets: Datasets) -> str:
    given = {
        **compact(line for _, group in lines for line in group),
        "datasets": [
            {**compact(own), "subsets": [compact(subset) for subset in subsets]} for own, subsets in datasets.lines()
        ],
    }
    return json.dumps(given, ensure_ascii=False, separators=(",", ":"))


def _report(faults: Faults, config_file: Path | None, dataset_config: Path | None) -> InputError:
    named = [f"train args: {config_file}"] if config_file else []
    named += [f"dataset: {dataset_config}"] if dataset_config else []
    count = "1 fault" if len(faults.texts) == 1 else f"{len(faults.texts)} faults"
    where = f" ({'; '.join(named)})" if named else ""
    return InputError.from_faults(f"The configuration has {count}{where}:", faults.texts)

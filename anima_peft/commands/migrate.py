"""Converts a configuration file of the older one-file layout into the two files of today."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import load
from ..config.checks import check_file_name
from ..config.files import read_toml
from ..config.loading import take_out_what_has_no_effect
from ..config.migration import is_root_style, migrate
from ..config.reading import Faults
from ..config.resolved import toml_document, toml_value
from ..errors import InputError
from ..files import write_atomically
from ..texts import escaped


def migrate_file(argv: Sequence[str], prog: str) -> None:
    """Convert a file as the command line says; prints what was written, decided and left out, and what to mend.

    Raises:
        InputError: the file cannot be converted, or outputs exist.
    """
    arguments = _parser(prog).parse_args(argv)
    source: Path = arguments.input.expanduser()
    folder: Path = arguments.output_dir.expanduser() if arguments.output_dir else source.parent / "kohya_converted"
    for option in ("train_args_name", "dataset_name"):
        try:
            check_file_name(getattr(arguments, option))
        except InputError as fault:
            raise InputError(f"--{option}: {fault}") from fault
    train_args, dataset = folder / arguments.train_args_name, folder / arguments.dataset_name
    _check_outputs(source, train_args, dataset, overwrite=arguments.overwrite)

    document = read_toml(source)
    if not is_root_style(document):
        raise InputError(
            f"{source}: not of the older one-file layout, which has tables such as [model] with transformer_path, "
            "[training] with epochs, and [lora]. Train args and dataset TOMLs are used as they are."
        )
    faults = Faults()
    migration = migrate(document, faults, save_every_unit=arguments.save_every_unit)
    if faults.texts:
        raise InputError.from_faults(f"{source} cannot be converted, and nothing was written:", faults.texts)
    take_out_what_has_no_effect(migration)
    _write(train_args, {**migration.train_args_document(), "dataset_config": dataset.as_posix()}, source)
    _write(dataset, migration.dataset_document(), source)

    print(f"train args: {train_args}\ndataset: {dataset}")
    for decision in migration.decisions:
        print(f"decided: {escaped(decision)}")
    for key, reason in migration.left_out.items():
        print(f"left out: {escaped(key)} ({escaped(reason)})")
    _check_result(train_args, dataset)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", type=Path, required=True, help="file of the older one-file layout")
    parser.add_argument(
        "--output_dir", type=Path, help="folder to write to (default: kohya_converted beside the input)"
    )
    parser.add_argument("--train_args_name", default="train_args.toml", help="file name (default %(default)s)")
    parser.add_argument("--dataset_name", default="dataset.toml", help="file name (default %(default)s)")
    parser.add_argument(
        "--save_every_unit",
        choices=("epochs", "steps"),
        help="what output.save_every counts (default: epochs where it is not above training.epochs, else steps)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser


def _check_outputs(source: Path, train_args: Path, dataset: Path, *, overwrite: bool) -> None:
    for path in (train_args, dataset):
        if path.resolve() == source.resolve():
            raise InputError(f"{path} is the input; choose another name or another --output_dir.")
    if train_args == dataset:
        raise InputError(f"--train_args_name and --dataset_name are both {train_args.name}; choose two names.")
    existing = [str(path) for path in (train_args, dataset) if path.exists()]
    if existing and not overwrite:
        raise InputError(f"{' and '.join(existing)} exist already; choose another --output_dir or add --overwrite.")


def _write(path: Path, document: Mapping[str, object], source: Path) -> None:
    text = "\n".join([f"# Converted from {toml_value(source.name)}", *toml_document(document)]) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def _check_result(train_args: Path, dataset: Path) -> None:
    """Say what the trainer would say of the files. They are complete all the same: the fault was in the old file, or
    something is missing on this machine."""
    try:
        load(["--config_file", str(train_args), "--dataset_config", str(dataset)])
    except InputError as fault:
        text = escaped(str(fault), keep="\n")
        print(f"to mend before training, in the new files: {text}", file=sys.stderr)

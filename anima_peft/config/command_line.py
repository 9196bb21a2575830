"""The flags, made from the options; every value stays text here and is read by the rules that TOML is read by."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import InputError
from .options import Kind, Option, option
from .reading import NO_VALUE, Faults, shown
from .schema import Given

_SHAPES = {
    Kind.TEXT: "TEXT",
    Kind.SWITCH: "",
    Kind.INTEGER: "N",
    Kind.NUMBER: "X",
    Kind.INTEGER_OR_NUMBER: "X",
    Kind.TEXTS: "TEXT ...",
    Kind.NUMBERS: "X ...",
    Kind.CUSTOM: "VALUE",
}


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Configuration files."""

    config_file: str | None = option(None, is_path=True, help="Train args TOML; flags given beside it win.")
    dataset_config: str = option(is_path=True, help="Dataset TOML.")
    print_config: bool = option(
        False, help="Print every option with its value and where that comes from, as TOML, and do nothing else."
    )


class _Collect(argparse.Action):
    """Appends what was written to `namespace.given`, so that nothing is lost, not even a flag given twice."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, declared: Option | None, nargs: str, help: str
    ) -> None:
        super().__init__(option_strings, dest, nargs=nargs, default=argparse.SUPPRESS, help=help)
        self.declared = declared

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        namespace.given.append((self.declared, flag, values))


class _Formatter(argparse.HelpFormatter):
    """Shows each option with the shape of its value, once for all its names."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not isinstance(action, _Collect) or action.declared is None:
            return super()._format_action_invocation(action)
        choices = action.declared.rules.choices
        shape = f"{{{','.join(choices)}}}" if choices else _SHAPES[action.declared.kind]
        return f"{', '.join(action.option_strings)} {shape}".rstrip()


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing and leaving."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}")


def make_parser(
    groups: Iterable[tuple[str, Sequence[Option]]], foreign: Iterable[str], prog: str | None = None
) -> argparse.ArgumentParser:
    """A parser with a flag for every option.

    Args:
        groups: titles and the options under them.
        foreign: names of other trainers' options; taken so that they can be reported, and left out of the help.
        prog: name of the command in the help text; None takes it from `sys.argv`.
    """
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        formatter_class=_Formatter,
        usage="%(prog)s --config_file TRAIN_ARGS.toml --dataset_config DATASET.toml [--OPTION VALUE ...]",
        description="Train an adapter for Anima. Every option but --config_file can also stand in the train args "
        "TOML under the same name; what is given here wins.",
    )
    for title, options in groups:
        group = parser.add_argument_group(title.rstrip("."))
        for declared in options:
            flags = [f"--{name}" for name in declared.names]
            if declared.kind is Kind.SWITCH:
                flags += [f"--no-{name}" for name in declared.names]
            # each takes any number of values, so that a missing or superfluous one is reported with all other faults
            nargs = "*" if declared.kind in (Kind.TEXTS, Kind.NUMBERS) else "?"
            text = help_text(declared).replace("%", "%%")
            group.add_argument(*flags, action=_Collect, nargs=nargs, declared=declared, help=text)
    for name in foreign:
        parser.add_argument(
            f"--{name}", f"--no-{name}", action=_Collect, nargs="*", declared=None, help=argparse.SUPPRESS
        )
    return parser


def help_text(declared: Option) -> str:
    """An option's help with what holds when it is not given."""
    text = declared.rules.help
    if declared.required:
        return f"{text} Required."
    if declared.default in (None, ()):
        return text
    return f"{text} Default: {declared.default if isinstance(declared.default, str) else shown(declared.default)}."


def read_flags(parser: argparse.ArgumentParser, argv: Sequence[str], faults: Faults) -> list[Given]:
    """Every flag that was written, known or not, in order."""
    namespace, rest = parser.parse_known_args(argv, argparse.Namespace(given=[]))
    givens = []
    for declared, flag, values in namespace.given:
        if declared is None:
            givens.append(_stranger(flag, values))
        elif declared.kind is not Kind.SWITCH:
            givens.append(Given(flag[2:], flag, NO_VALUE if values is None else values, as_text=True))
        elif values is None:
            givens.append(_stranger(flag, []))
        else:
            faults.add(flag, f"takes no value, got {shown(values)}; write --{declared.name} or --no-{declared.name}")
    in_unknown = False
    for word in rest:
        if word.startswith("--"):
            givens.append(_stranger(word.partition("=")[0], []))
        elif not in_unknown:
            faults.add(word, "unexpected on the command line; options are written --name value")
        in_unknown = in_unknown or word.startswith("--")  # words after an unknown flag may be its values
    return givens


def _stranger(flag: str, values: list[str]) -> Given:
    """A flag of unknown type; on its own it switches something on, or off as `--no-name`."""
    raw: object = values[0] if len(values) == 1 else values
    if not values:
        raw = not flag.startswith("--no-")
    return Given(flag.removeprefix("--no-").removeprefix("--"), flag, raw, as_text=True)

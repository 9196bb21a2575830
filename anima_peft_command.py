"""The `anima-peft` command, up to where it is known what shall be done.

It stands beside the package, whose import brings in torch and all of diffusers' pipelines: seconds that `--help`,
`--version` and a mistyped name need not take.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn


class Command(NamedTuple):
    """A sub-command.

    Attributes:
        entry: the function that takes its arguments, as `module:name`; imported when the command runs.
        help: what it is for.
    """

    entry: str
    help: str


COMMANDS = {
    "train": Command("anima_peft.commands.train:run", "train an adapter"),
    "generate": Command("anima_peft.commands.generate:run", "draw pictures, with or without adapters"),
    "inspect": Command("anima_peft.commands.inspect:run", "say what is in adapter files"),
    "convert": Command("anima_peft.commands.convert:run", "write an adapter file in another style"),
    "merge": Command("anima_peft.commands.merge:run", "adapters into one, or into a checkpoint"),
    "extract": Command("anima_peft.commands.extract:run", "an adapter out of two checkpoints"),
    "resize": Command("anima_peft.commands.resize:run", "an adapter of lower rank"),
    "share": Command("anima_peft.commands.share:run", "push an adapter with a model card to a hub"),
    "download": Command("anima_peft.commands.download:run", "fetch the model or its tokenizers"),
    "check": Command("anima_peft.commands.check:run", "look a dataset over before training"),
    "report": Command("anima_peft.commands.report:run", "write the page about a run, also while it is at work"),
    "miniature": Command("anima_peft.miniature.commands:write", "write a small Anima and pictures to try things out"),
    "miniature-score": Command(
        "anima_peft.miniature.commands:score_adapter", "what an adapter has taught the small Anima"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        argv: the words of the command line; None for this process's own.

    Returns:
        The exit code: 0 done, 1 the run could not go on, 2 a fault in what was given, 130 interrupted, 143 terminated.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="anima-peft",
        description="Train adapters for the Anima image model, and use them. `anima-peft COMMAND --help` says more.",
        epilog="exit codes: 0 done, 1 the run could not go on, 2 a fault in what was given; 130 interrupted, "
        "143 terminated",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.help, add_help=False)
    known, rest = parser.parse_known_args(argv[:1])
    from anima_peft.cli import report_faults

    return report_faults(lambda: pkgutil.resolve_name(COMMANDS[known.command].entry)(rest + argv[1:]))


class _Version(argparse.Action):
    """argparse's own would have the version looked up for every command, which takes as long as all else here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"{parser.prog} {importlib.metadata.version('anima-peft')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())

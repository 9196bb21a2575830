"""`anima-peft report`: the page about a run, from its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .parts import command_parser


def run(argv: Sequence[str]) -> None:
    """Write the report that the command line asks for, and print its path.

    Raises:
        InputError: the folder holds no record, or several and none was named.
    """
    parser = command_parser(
        "report",
        "Write the page about a run from its record: while the run is at work, after it, or after it has crashed.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of the run")
    parser.add_argument("--name", help="output_name of the run, where the folder has several")
    arguments = parser.parse_args(argv)
    from ..training.outputs import RECORD_SUFFIX, Outputs
    from ..training.report import write_report

    folder: Path = arguments.run.expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the output_dir of a run")
    names = sorted(path.name.removesuffix(RECORD_SUFFIX) for path in folder.glob(f"*{RECORD_SUFFIX}"))
    if arguments.name is not None and arguments.name not in names:
        there = f"there are {', '.join(names)}" if names else "there is none"
        raise InputError(f"--name: {folder} has no {arguments.name}{RECORD_SUFFIX}; {there}")
    if not names:
        raise InputError(
            f"{folder}: no record of a run (<output_name>{RECORD_SUFFIX}); one is begun with the first step"
        )
    if arguments.name is None and len(names) > 1:
        raise InputError(f"{folder}: several runs; choose one by --name: {', '.join(names)}")
    print(write_report(Outputs(folder, arguments.name or names[0])))

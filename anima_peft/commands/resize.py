"""`anima-peft resize`: an adapter of lower rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..adapters.resizing import resize
from ..errors import InputError
from .parts import (
    DTYPES,
    MODEL_HELP,
    add_file_options,
    add_keep_options,
    command_parser,
    keep_of,
    modules_bar,
    print_approximation,
    table_at,
)


def run(argv: Sequence[str]) -> None:
    """Resize as the flags say, and say what was kept.

    Raises:
        InputError: the file cannot be read as a whole, no size is given, or the output may not be written.
    """
    parser = command_parser(
        "resize",
        "Write an adapter with a lower rank: of every module the nearest there is. LoRA and LoKr keep their kind; LoHa "
        "and whole differences become LoRA.",
        "anima-peft resize mine.safetensors small.safetensors --rank 8",
        "anima-peft resize mine.safetensors small.safetensors --energy 0.95 --rank 32 --dtype bf16",
    )
    parser.add_argument("source", metavar="FILE", help="adapter file, folder, or hub repo id")
    parser.add_argument("output", type=Path, metavar="NEW_FILE", help="the file to write; ends in .safetensors")
    add_keep_options(
        parser,
        "at most this rank in every module; of LoKr, of its larger factor",
        "in every module the lowest rank that keeps this share of the delta's squared norm, such as 0.95",
    )
    add_file_options(parser)
    parser.add_argument("--model", metavar="PATH", help=f"{MODEL_HELP}; needed for absolute norms")
    parser.add_argument("--verbose", action="store_true", help="list every module's kept energy")
    arguments = parser.parse_args(argv)
    keep = keep_of(arguments)
    if keep is None:
        raise InputError("resize: give --rank, --energy, or both.")
    done = resize(
        arguments.source,
        arguments.output.expanduser(),
        keep,
        style=arguments.format or "kohya",
        dtype=DTYPES.get(arguments.dtype),
        table=table_at(arguments.model),
        overwrite=arguments.overwrite,
        bar=modules_bar("resizing"),
    )
    print_approximation(done, verbose=arguments.verbose)

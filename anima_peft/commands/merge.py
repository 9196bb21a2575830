"""`anima-peft merge`: adapters into one file, or into a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..adapters.baking import bake
from ..adapters.merging import merge
from ..errors import InputError
from .parts import (
    DTYPES,
    MODEL_HELP,
    adapter_and_strength,
    add_file_options,
    add_keep_options,
    bytes_bar,
    command_parser,
    keep_of,
    modules_bar,
    table_at,
)


def run(argv: Sequence[str]) -> None:
    """Merge as the flags say, and say what was written.

    Raises:
        InputError: a file cannot be read or does not fit, an option has no effect, or the output may not be written.
    """
    parser = command_parser(
        "merge",
        "Merge adapters: their deltas are added, each times its strength. Into one adapter file, exactly or cut to a "
        "rank; or with --into, into a checkpoint that then needs no adapter.",
        "anima-peft merge style.safetensors=0.7 figure.safetensors --output both.safetensors",
        "anima-peft merge style.safetensors=0.7 figure.safetensors --output both.safetensors --rank 32 --dtype bf16",
        "anima-peft merge style.safetensors=0.8 --into anima.safetensors --output anima_style.safetensors",
    )
    parser.add_argument(
        "adapters", nargs="+", metavar="FILE[=STRENGTH]", help="adapter file, folder or hub repo id (strength 1)"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="NEW_FILE", help="ends in .safetensors")
    parser.add_argument(
        "--into", type=Path, metavar="CHECKPOINT", help="single file with DiT and conditioner; it stays as it is"
    )
    add_keep_options(
        parser,
        "every delta becomes a LoRA of at most this rank; unset, the sum is exact",
        "every delta becomes a LoRA that keeps this share of its squared norm, such as 0.99",
    )
    add_file_options(parser)
    parser.add_argument("--model", metavar="PATH", help=f"{MODEL_HELP}; needed for absolute norms")
    arguments = parser.parse_args(argv)
    adapters = [adapter_and_strength(text) for text in arguments.adapters]
    if arguments.into is not None:
        unused = [name for name in ("rank", "energy", "format", "dtype", "model") if getattr(arguments, name)]
        if unused:
            raise InputError(f"--{unused[0]} has no effect with --into: the checkpoint's keys and dtypes stay.")
        baked = bake(
            adapters,
            arguments.into.expanduser(),
            arguments.output.expanduser(),
            overwrite=arguments.overwrite,
            started=bytes_bar("writing"),
        )
        print(f"{baked.path}: {baked.modules} modules changed")
        print(f"Rounding to the checkpoint's dtype changed the deltas by {baked.lost:.1e} of their size.")
        return
    merged = merge(
        adapters,
        arguments.output.expanduser(),
        keep=keep_of(arguments),
        style=arguments.format or "kohya",
        dtype=DTYPES.get(arguments.dtype),
        table=table_at(arguments.model),
        overwrite=arguments.overwrite,
        bar=modules_bar("merging"),
    )
    print(f"{merged.path}: {merged.contents}")
    if keep_of(arguments) is None:
        print("The deltas are the sums, with nothing cut off.")
    else:
        print(f"kept energy: {merged.kept:.4%} of the squared Frobenius norm of all deltas")

"""`anima-peft extract`: an adapter out of two checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..adapters.extracting import METHODS, Extraction, extract
from ..adapters.targets import ALL_LINEAR, PRESETS
from ..errors import InputError
from .parts import (
    DTYPES,
    add_file_options,
    add_keep_options,
    command_parser,
    device_of,
    keep_of,
    modules_bar,
    positive,
    print_approximation,
)


def run(argv: Sequence[str]) -> None:
    """Extract as the flags say, and say what was kept.

    Raises:
        InputError: the checkpoints cannot be read or are of different models, an option is missing or has no effect,
            or the output may not be written.
    """
    arguments = _parser().parse_args(argv)
    keep = keep_of(arguments)
    if arguments.method == "lora" and keep is None:
        raise InputError("extract: a LoRA needs --rank, --energy, or both.")
    if arguments.method == "lora" and arguments.factor is not None:
        raise InputError("extract: --factor has no effect on a LoRA; it is LoKr's.")
    device = device_of(arguments.device)
    how = Extraction(
        arguments.method,
        keep,
        factor=arguments.factor or 8,
        targets=arguments.target_modules,
        whole=arguments.whole_modules,
        norms=arguments.norms,
        device=device,
    )
    done = extract(
        arguments.base.expanduser(),
        arguments.tuned.expanduser(),
        arguments.output.expanduser(),
        how,
        style=arguments.format or "kohya",
        dtype=DTYPES.get(arguments.dtype),
        overwrite=arguments.overwrite,
        bar=modules_bar("extracting"),
    )
    print_approximation(done, verbose=arguments.verbose)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "extract",
        "Write the adapter that turns one checkpoint into another, as nearly as its rank allows. Both are single files "
        "with DiT and conditioner. On a CPU a full-size pair takes about half an hour; --device cuda is far faster.",
        "anima-peft extract --base anima.safetensors --tuned mine.safetensors --output adapter.safetensors --rank 32",
        "anima-peft extract --base anima.safetensors --tuned mine.safetensors --output lokr.safetensors --method lokr",
    )
    parser.add_argument("--base", required=True, type=Path, metavar="CHECKPOINT", help="what the adapter is for")
    parser.add_argument("--tuned", required=True, type=Path, metavar="CHECKPOINT", help="what it shall become")
    parser.add_argument("--output", required=True, type=Path, metavar="NEW_FILE", help="ends in .safetensors")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="lora",
        help="lora: by SVD (default); lokr: the nearest Kronecker product, whose larger factor is full unless a rank "
        "or energy is given",
    )
    add_keep_options(
        parser,
        "at most this rank in every module; of LoKr, of its larger factor",
        "in every module the lowest rank that keeps this share of the difference's squared norm, such as 0.95",
    )
    parser.add_argument("--factor", type=positive, help="size of LoKr's smaller factor (default 8)")
    parser.add_argument(
        "--target_modules",
        nargs="+",
        default=[ALL_LINEAR],
        metavar="PATTERN",
        help=f"linear layers to approximate: {', '.join(PRESETS)} or patterns of names (default {ALL_LINEAR}: all that "
        "differ)",
    )
    parser.add_argument(
        "--whole_modules",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="linear layers whose difference is kept whole, as .diff",
    )
    parser.add_argument(
        "--norms",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep what norms and biases have learned, as w_norm, b_norm and diff_b (default: on)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to decompose (default cpu)")
    add_file_options(parser)
    parser.add_argument("--verbose", action="store_true", help="list every module's kept energy")
    return parser

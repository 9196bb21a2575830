"""`anima-peft inspect` and `anima-peft convert`: adapter files without a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .adapters.conversion import NEGLIGIBLE, Conversion, convert
from .adapters.inspection import as_json, as_text, inspect_adapter, shown
from .adapters.writing import FOLDING, FORMATS
from .command_parts import DTYPES, MODEL_HELP, table_at
from .errors import InputError


def inspect_command(argv: Sequence[str]) -> None:
    """Say what is in adapter files.

    Raises:
        InputError: a file is not there or is not safetensors; or, after all were shown, one of them would not load.
    """
    parser = argparse.ArgumentParser(
        prog="anima-peft inspect",
        description="Say what an adapter file holds, in which style, how strong it is, and whether it would load.",
        epilog="example:\n  anima-peft inspect my_lora.safetensors --model anima.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="adapter file, folder, or hub repo id")
    parser.add_argument("--model", metavar="PATH", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text, one object per file")
    arguments = parser.parse_args(argv)
    table = table_at(arguments.model)
    refused = []
    for file in arguments.files:
        found = inspect_adapter(file, table)
        print(as_json(found) if arguments.json else "\n".join(as_text(found)))
        refused += [shown(str(found.path))] if found.refusal is not None else []
    if refused:
        raise InputError(f"would not load: {', '.join(refused)} (the reasons stand above).")


def convert_command(argv: Sequence[str]) -> None:
    """Write an adapter in another style.

    Raises:
        InputError: the file cannot be read as a whole, or the new one exists.
    """
    parser = argparse.ArgumentParser(
        prog="anima-peft convert",
        description="Write an adapter file in another style. Nothing is lost: what cannot be understood is refused.",
        epilog="examples:\n"
        "  anima-peft convert mine.safetensors for_diffusers.safetensors --format diffusers\n"
        "  anima-peft convert mine.safetensors small.safetensors --format kohya --dtype bf16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="FILE", help="adapter file, folder, or hub repo id")
    parser.add_argument("output", metavar="NEW_FILE", help="the file to write; ends in .safetensors")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="kohya: sd-scripts, ComfyUI, Forge; comfy: diffusion_model.… with the scale folded in; diffusers: stock "
        "diffusers; comfy-hybrid and original: kohya's parts under native names",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the factors; unset, as they are")
    parser.add_argument("--model", metavar="PATH", help=f"{MODEL_HELP}; needed for absolute norms")
    parser.add_argument("--overwrite", action="store_true", help="replace the new file if it exists")
    arguments = parser.parse_args(argv)
    done = convert(
        arguments.source,
        arguments.output,
        arguments.format,
        dtype=DTYPES.get(arguments.dtype),
        table=table_at(arguments.model),
        overwrite=arguments.overwrite,
    )
    print(f"{done.path}: {done.modules} modules")
    print(_price(done, folded=arguments.format in FOLDING, dtype=arguments.dtype))


def _price(done: Conversion, *, folded: bool, dtype: str | None) -> str:
    if done.change == 0:
        return "The deltas are the same to the last bit."
    text = f"The deltas changed by at most {done.change:.1e} of their size"
    if done.change <= NEGLIGIBLE:
        return f"{text}, which is float32's rounding."
    assert done.changed is not None
    what = "the scale was folded into rounded factors" if folded and dtype is None else "the factors were rounded"
    return f"{text} ({done.changed.native}): {what}; --dtype fp32 keeps them."

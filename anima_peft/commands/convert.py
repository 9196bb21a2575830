"""`anima-peft convert`: an adapter file in another style, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..adapters.conversion import NEGLIGIBLE, Conversion, convert
from ..adapters.writing import FOLDING, FORMATS
from .parts import DTYPES, MODEL_HELP, command_parser, table_at


def run(argv: Sequence[str]) -> None:
    """Write an adapter in another style.

    Raises:
        InputError: the file cannot be read as a whole, or the new one exists.
    """
    parser = command_parser(
        "convert",
        "Write an adapter file in another style. Nothing is lost: what cannot be understood is refused.",
        "anima-peft convert mine.safetensors for_diffusers.safetensors --format diffusers",
        "anima-peft convert mine.safetensors small.safetensors --format kohya --dtype bf16",
    )
    parser.add_argument("source", metavar="FILE", help="adapter file, folder, or hub repo id")
    parser.add_argument("output", type=Path, metavar="NEW_FILE", help="the file to write; ends in .safetensors")
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
        arguments.output.expanduser(),
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

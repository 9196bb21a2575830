"""`anima-peft inspect`: what is in adapter files, without a model."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.inspection import as_json, as_text, inspect_adapter, shown
from ..errors import InputError
from .parts import MODEL_HELP, command_parser, table_at


def run(argv: Sequence[str]) -> None:
    """Say what is in adapter files.

    Raises:
        InputError: a file is not there or is not safetensors; or, after all were shown, one of them would not load.
    """
    parser = command_parser(
        "inspect",
        "Say what an adapter file holds, in which style, how strong it is, and whether it would load.",
        "anima-peft inspect my_lora.safetensors --model anima.safetensors",
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

"""`anima-peft download`: the model, or its tokenizers, into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from ..errors import InputError
from ..files import require_writable
from ..models.hub_folders import Hub, HubFolder
from ..models.model_downloads import (
    CHECKPOINT,
    DIFFUSERS_REPO,
    SINGLE_FILES_REPO,
    Fetched,
    diffusers_folder,
    fetch_files,
    single_files,
)
from ..models.tokenizer_downloads import complete_tokenizer
from ..models.tokenizers import QWEN, T5
from .parts import HUBS, command_parser


def run(argv: Sequence[str]) -> None:
    """Fetch what the flags name, and say where it is.

    Raises:
        InputError: no hub serves, something else is in the way, or there is no room.
    """
    parser = command_parser(
        "download",
        "Fetch the model or its tokenizers from Hugging Face or, where that fails, from ModelScope (HF_ENDPOINT names "
        "a mirror). What broke off goes on; what is there is compared with the hub and never overwritten.",
        "anima-peft download single-files tokenizers --output_dir models",
        "anima-peft download diffusers --output_dir Anima-Base-v1.0-Diffusers",
    )
    parser.add_argument(
        "what",
        nargs="+",
        choices=("single-files", "diffusers", "tokenizers"),
        metavar="WHAT",
        help="single-files: the three files that ComfyUI uses (5.6 GB); diffusers: the diffusers folder; tokenizers: "
        "qwen_tokenizer and t5_tokenizer (20 MB)",
    )
    parser.add_argument("--output_dir", required=True, type=Path, metavar="FOLDER", help="made if missing")
    parser.add_argument("--hub", choices=HUBS, help="ask this hub only")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help=f"single file with DiT and conditioner, by its name in the repo (default {CHECKPOINT})",
    )
    arguments = parser.parse_args(argv)
    if arguments.checkpoint is not None and "single-files" not in arguments.what:
        raise InputError("--checkpoint has no effect without single-files.")
    checkpoint = arguments.checkpoint or CHECKPOINT
    if PurePath(checkpoint).name != checkpoint or not checkpoint.endswith(".safetensors"):
        raise InputError(f"--checkpoint {checkpoint}: expected the name of a .safetensors file.")
    hubs = [HUBS[arguments.hub]] if arguments.hub else list(Hub)
    folder: Path = arguments.output_dir.expanduser()
    require_writable("--output_dir", folder)
    if "tokenizers" in arguments.what:
        for kind in (QWEN, T5):
            place = folder / kind.option.removesuffix("_dir")
            complete_tokenizer(kind, place, [source for source in kind.sources if source.hub in hubs])
            print(place)
    if "single-files" in arguments.what:
        sources = [HubFolder(hub, SINGLE_FILES_REPO) for hub in hubs]
        _report(fetch_files(folder, sources, single_files(checkpoint)))
    if "diffusers" in arguments.what:
        sources = [HubFolder(hub, DIFFUSERS_REPO) for hub in hubs]
        _report(fetch_files(folder, sources, diffusers_folder))


def _report(fetched: Fetched) -> None:
    for path in fetched.written:
        print(path)
    for path in fetched.there:
        print(f"{path} (was there)")

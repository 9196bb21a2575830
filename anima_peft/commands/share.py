"""`anima-peft share`: an adapter with a model card, pushed to a hub."""

from __future__ import annotations

import argparse
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..adapters.inspection import Inspection, inspect_adapter
from ..errors import InputError
from ..files import require_writable
from ..models.checkpoints import read_header
from ..models.hub_folders import REPO_ID
from ..sharing.card import BASE_MODEL, Card, Example
from ..sharing.folder import find_pictures, kind_of, write_folder
from ..sharing.hubs import push
from .parts import HUBS, command_parser

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LINK = re.compile(r"https?://[^\s()<>\"]+")


def run(argv: Sequence[str]) -> None:
    """Share as the flags say, and say where it went.

    Raises:
        InputError: the file would not load, a picture cannot be read, something is in the way, or there is no token.
        TrainingError: the hub refuses.
    """
    arguments = _parser().parse_args(argv)
    adapter: Path = arguments.adapter.expanduser()
    if not adapter.is_file():
        raise InputError(f"{adapter}: no such adapter file.")
    if not REPO_ID.fullmatch(arguments.repo):
        raise InputError(f"--repo {arguments.repo}: expected OWNER/NAME.")
    if arguments.prompts and not arguments.images:
        raise InputError("--prompts has no effect without --images.")
    if not _LICENSE.fullmatch(arguments.license):
        raise InputError(f"--license {arguments.license}: expected an id such as mit, apache-2.0 or other.")
    if arguments.license_link and not _LINK.fullmatch(arguments.license_link):
        raise InputError(f"--license_link {arguments.license_link}: expected an address, https://….")
    if not math.isfinite(arguments.strength):
        raise InputError(f"--strength {arguments.strength}: expected a finite number.")
    found = inspect_adapter(adapter)
    if found.refusal is not None:
        raise InputError(f"what nobody can load is not shared.\n{found.refusal}")
    pictures = find_pictures(arguments.images)
    if len(arguments.prompts) not in (0, 1, len(pictures)):
        raise InputError(
            f"--prompts: {len(arguments.prompts)} for {len(pictures)} pictures; give one for each, or one."
        )
    prompts = arguments.prompts or [""]
    prompts = prompts * len(pictures) if len(prompts) == 1 else prompts
    examples = [
        Example(f"{number:02d}{suffix}", prompt)
        for number, ((_, suffix), prompt) in enumerate(zip(pictures, prompts, strict=True), start=1)
    ]
    card = _card(arguments, adapter, found, examples)
    if arguments.output_dir is not None or arguments.dry_run:
        folder: Path = (arguments.output_dir or adapter.with_name(f"{adapter.stem}_share")).expanduser()
        _require_free(folder, overwrite=arguments.overwrite)
        write_folder(folder, card, adapter, pictures)
        print(f"{folder}: card, adapter and {len(pictures)} pictures")
    if arguments.dry_run:
        print("Nothing was pushed.")
        return
    with tempfile.TemporaryDirectory(prefix="anima_peft-") as temporary:
        write_folder(Path(temporary), card, adapter, pictures)
        pushed = push(
            Path(temporary),
            arguments.repo,
            card.hub,
            private=not arguments.public,
            license=arguments.license,
            overwrite=arguments.overwrite,
        )
    seen = ("public" if arguments.public else "private") if pushed.created else "as visible as it was"
    print(f"{pushed.page} ({seen})")


def _card(arguments: argparse.Namespace, adapter: Path, found: Inspection, examples: Sequence[Example]) -> Card:
    metadata = read_header(adapter).metadata
    return Card(
        repo_id=arguments.repo,
        hub=HUBS[arguments.hub],
        file=adapter.name,
        title=arguments.title or metadata.get("modelspec.title") or adapter.stem,
        description=arguments.description,
        license=arguments.license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        base_model=arguments.base_model,
        trigger=arguments.trigger or metadata.get("modelspec.trigger_phrase", ""),
        contents=", ".join(f"{count} x {text}" for text, count in found.kinds.items()),
        kind=kind_of(found),
        strength=arguments.strength,
        stock_diffusers=set(found.styles) == {"diffusers"} and kind_of(found) == "lora",
        metadata=metadata,
        examples=examples,
    )


def _require_free(folder: Path, *, overwrite: bool) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"{folder} is not empty; choose another --output_dir or add --overwrite.")
    require_writable("--output_dir", folder)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "share",
        "Push an adapter to Hugging Face or ModelScope, with a model card that says what it is and how to load it. A "
        "new repo is private unless --public is given. The file goes as it is, with all its metadata: look at them "
        "with `anima-peft inspect`.",
        "anima-peft share mine.safetensors --repo me/mine --license mit --images previews --dry_run",
        'anima-peft share mine.safetensors --repo me/mine --license other --images 1.png --prompts "1girl, solo" '
        "--trigger mychar --public",
        "anima-peft share mine.safetensors --repo me/mine --license apache-2.0 --hub modelscope",
    )
    parser.add_argument("adapter", type=Path, metavar="FILE", help="adapter file")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repo id; made if it is not there")
    parser.add_argument("--hub", choices=HUBS, default="huggingface", help="default huggingface")
    parser.add_argument(
        "--license",
        required=True,
        metavar="ID",
        help="licence id as the hub knows it, such as mit or other; the base model's own licence decides what may be",
    )
    parser.add_argument("--license_name", default="", metavar="TEXT", help="name of a licence without an id")
    parser.add_argument("--license_link", default="", metavar="URL", help="where its text is")
    parser.add_argument("--images", nargs="+", type=Path, default=[], metavar="PATH", help="pictures, or their folder")
    parser.add_argument("--prompts", nargs="+", default=[], metavar="TEXT", help="the pictures' prompts, in order")
    parser.add_argument("--trigger", default="", metavar="WORDS", help="trigger words (default: from the metadata)")
    parser.add_argument("--title", default="", help="default: from the metadata, or the file's name")
    parser.add_argument("--description", default="", help="a text of yours; Markdown")
    parser.add_argument("--base_model", default=BASE_MODEL, metavar="REPO", help="repo id (default %(default)s)")
    parser.add_argument("--strength", type=float, default=1.0, help="the strength to start with (default 1)")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--public", action="store_true", help="anyone may see a new repo")
    seen.add_argument("--private", action="store_true", help="only you may see a new repo (default)")
    parser.add_argument("--dry_run", action="store_true", help="write the folder and push nothing")
    parser.add_argument(
        "--output_dir", type=Path, metavar="FOLDER", help="keep the folder here (dry run: beside the file)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of the folder and of the repo")
    return parser

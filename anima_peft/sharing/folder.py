"""The folder that is shared: adapter, pictures, card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..adapters.inspection import Inspection
from ..errors import InputError
from ..files import write_atomically
from .card import PICTURE_FOLDER, Card, model_card

_PICTURES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
_MOST_PICTURES = 50
CARD_NAME = "README.md"
KINDS = ("LoKr", "LoHa", "DoRA", "LoRA")


def find_pictures(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """The pictures among files and folders, in order, each with the suffix that its content calls for.

    Raises:
        InputError: nothing there, no picture, a picture that cannot be read, or very many.
    """
    found: list[tuple[Path, str]] = []
    for path in (path.expanduser() for path in paths):
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if file.suffix.lower() in (*_PICTURES.values(), ".jpeg")]
            if not inside:
                raise InputError(f"--images {path}: no .png, .jpg or .webp in the folder.")
            found += [(file, _suffix(file)) for file in inside]
        else:
            found.append((path, _suffix(path)))
    if len(found) > _MOST_PICTURES:
        raise InputError(f"--images: {len(found)} pictures, expected at most {_MOST_PICTURES} for a card.")
    return found


def _suffix(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"--images {path}: no such file or folder.")
    try:
        with Image.open(path) as picture:
            kind = picture.format or ""
            picture.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"--images {path}: not a picture that can be read ({error}).") from error
    if kind not in _PICTURES:
        raise InputError(f"--images {path}: is {kind}; hubs show PNG, JPEG and WebP.")
    return _PICTURES[kind]


def kind_of(found: Inspection) -> str:
    """The tag for what an adapter mostly is: lora, lokr, …"""
    counts = {kind: sum(n for text, n in found.kinds.items() if text.startswith(kind)) for kind in KINDS}
    kind, count = max(counts.items(), key=lambda item: item[1])
    return kind.lower() if count else "adapter"


def write_folder(folder: Path, card: Card, adapter: Path, pictures: Sequence[tuple[Path, str]]) -> None:
    """Put card, adapter and pictures into a folder; the card comes last.

    Args:
        folder: made if missing.
        card: its examples name the pictures, in their order.
        adapter: the file.
        pictures: as `find_pictures` found them.

    Raises:
        OSError: the folder cannot be written.
    """
    write_atomically(folder / card.file, partial(shutil.copyfile, adapter))
    for (picture, _), example in zip(pictures, card.examples, strict=True):
        target = folder / PICTURE_FOLDER / example.file
        write_atomically(target, partial(shutil.copyfile, picture))
    text = model_card(card)
    write_atomically(folder / CARD_NAME, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))

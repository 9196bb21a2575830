"""Captions from the text files beside the pictures."""

from __future__ import annotations

import codecs
from io import StringIO
from pathlib import Path

from ..errors import InputError


def caption_path(picture: Path, extension: str) -> Path:
    """The caption file of `picture`: same folder and stem, `extension` (".txt"; a missing dot is added)."""
    return picture.with_suffix(extension if extension.startswith(".") else f".{extension}")


def read_caption(path: Path) -> str | None:
    """The first line of a caption file, stripped; "" for an empty file, None if there is no such file.

    UTF-8 with or without byte order mark, or UTF-16 with one. The rest of the file is left alone: sd-scripts reads
    further lines only as wildcards.

    Raises:
        InputError: the file cannot be read or is in another encoding.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot read this caption file ({error.strerror or error})") from error
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: this caption file is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    return StringIO(text, newline=None).readline().strip()

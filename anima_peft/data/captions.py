"""Captions as they are written: in text files beside the pictures, or in metadata files for many pictures."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ..errors import InputError
from ..limited import read_limited
from .specs import CaptionSpec

# Of these, the first that an entry has. The first is sd-scripts', the second Hugging Face's (imagefolder).
_PATH_KEYS = ("image_path", "file_name")
_CAPTION_KEYS = ("caption", "text")
MOST_CAPTION_BYTES = 2**20
"""Of a caption file. What fills the longest conditioning has a hundredth of that."""
MOST_METADATA_BYTES = 2**30


@dataclass(frozen=True)
class MetadataEntry:
    """One picture of a metadata file."""

    path: str
    """Of the picture, as it is written."""
    caption: str | None
    """One caption a line; None where it has none."""
    tags: str | None
    """Tags that belong to each of the captions."""

    def text(self, spec: CaptionSpec) -> str | None:
        """The captions with the tags behind each, as sd-scripts joins them; None where there is neither."""
        if not self.caption or not self.tags:
            return self.caption or self.tags
        tags = spec.caption_separator.join(self.tags.split("\n"))
        lines = (line for line in self.caption.split("\n") if line.strip())
        return "\n".join(f"{line}{spec.caption_separator} {tags}" for line in lines)


def caption_path(picture: Path, extension: str) -> Path:
    """The caption file of `picture`: same folder and stem, `extension` (".txt"; a missing dot is added)."""
    return picture.with_suffix(extension if extension.startswith(".") else f".{extension}")


def read_caption(path: Path) -> str | None:
    """The lines of a caption file that are not empty, each stripped; "" for an empty file, None if there is none.

    UTF-8 with or without byte order mark, or UTF-16 with one.

    Raises:
        InputError: the file cannot be read, is too large for a caption, or is in another encoding.
    """
    try:
        text = _read_text(path, "caption file", MOST_CAPTION_BYTES)
    except FileNotFoundError:
        return None
    return clean_lines(text)


def clean_lines(text: str) -> str:
    """The lines of a text that are not empty, each stripped."""
    lines = (line.strip() for line in StringIO(text, newline=None))
    return "\n".join(line for line in lines if line)


def read_metadata(path: Path) -> list[MetadataEntry]:
    """The entries of sd-scripts' metadata file: a JSON object by picture, or one JSON object a line (`.jsonl`).

    A caption may also be a list of captions. What else an entry says is left alone, as sd-scripts does.

    Raises:
        InputError: the file cannot be read, or is not such a file; lists all faulty entries.
    """
    try:
        text = _read_text(path, "metadata file", MOST_METADATA_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such metadata file") from None
    faults: list[str] = []
    entries = []
    for where, value in _values(path, text):
        try:
            entries.append(_entry(value))
        except InputError as error:
            faults.append(f"{where}: {error}")
    if faults:
        raise InputError.from_faults(f"{path}: this metadata file cannot be used:", faults)
    if not entries:
        raise InputError(f"{path}: no pictures in this metadata file")
    return entries


def _values(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Each entry with where it stands, its path under the first of `_PATH_KEYS`."""

    def parse(part: str, where: str) -> object:
        try:
            return json.loads(part, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: {where}not JSON ({error})") from error

    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(StringIO(text, newline=None), 1):  # not splitlines, which ends them inside texts
            if line.strip():
                value = parse(line, f"line {number} is ")
                yield f"line {number}", value if isinstance(value, dict) else {}
        return
    document = parse(text, "")
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected an object whose keys are pictures, or one object a line in a .jsonl file")
    for key, value in document.items():
        yield json.dumps(key, ensure_ascii=False), {**(value if isinstance(value, dict) else {}), _PATH_KEYS[0]: key}


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, whose keys Python would let overwrite each other."""
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands in it twice; remove one")
        found[key] = value
    return found


def _entry(value: Mapping[str, object]) -> MetadataEntry:
    path = next((value[key] for key in _PATH_KEYS if key in value), None)
    if not isinstance(path, str) or not path:
        raise InputError(f'expected an object with a text "{_PATH_KEYS[0]}"')
    caption = next((value[key] for key in _CAPTION_KEYS if value.get(key) is not None), None)
    if isinstance(caption, list) and all(isinstance(line, str) for line in caption):
        caption = "\n".join(" ".join(line.split("\n")) for line in caption)
    tags = value.get("tags")
    for name, text in (("caption", caption), ("tags", tags)):
        if text is not None and not isinstance(text, str):
            raise InputError(f'expected a text under "{name}"')
        _require_characters(text or "", f'the text under "{name}"')
    return MetadataEntry(
        path,
        clean_lines(caption) if isinstance(caption, str) else None,
        clean_lines(tags) if isinstance(tags, str) else None,
    )


def _require_characters(text: str, what: str) -> None:
    """Refuse what no tokenizer takes, and what shows that a text was read in another encoding than its own."""
    if "\0" in text:
        raise InputError(f"{what} has NUL characters, as UTF-16 without a byte order mark has; save it as UTF-8")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(f"{what} has half of a surrogate pair, which is no character; remove it")


def _read_text(path: Path, what: str, most_bytes: int) -> str:
    try:
        data = read_limited(path, most_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot read this {what} ({error.strerror or error})") from error
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: this {what} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    _require_characters(text, f"{path}: this {what}")
    return text

"""Cached tensors on disk, named by what they were made from, and an index that spares reading files again.

Nothing here is ever out of date: an entry's name is a hash of everything that decides its content, so a changed
picture, caption, model or option asks for another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..errors import InputError
from ..files import save_tensors, unfinished_name, write_atomically
from ..limited import parse_json, read_json, read_limited
from .pixels import MOST_PICTURE_BYTES
from .seals import damaged, is_seal_of, metadata_of, seal

CACHE_FOLDER_NAME = ".anima_cache"
INDEX_NAME = "index.json"
MODEL_INDEX_NAME = "models.json"
_INDEX_VERSION = 1
MOST_INDEX_BYTES = 2**30
_MOST_ENTRY_BYTES = 2**32
Stamp = tuple[int, int]
"""(bytes, time of the last change in ns) of a file."""
_ABANDONED_AFTER = 24 * 60 * 60.0  # seconds; an entry is written within one
_LENGTH = 8  # bytes that say how long the header of a safetensors file is
_USUAL_HEADER, _MOST_HEADER = 1024, 2**16
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_SHA256 = re.compile("[0-9a-f]{64}")

logger = logging.getLogger(__name__)


def cache_folder(image_dir: Path, cache_dir: Path | None) -> Path:
    """Where the entries of a folder of pictures lie: `cache_dir` if given, else `<image_dir>/.anima_cache`."""
    return image_dir / CACHE_FOLDER_NAME if cache_dir is None else cache_dir


def remove_abandoned(folder: Path) -> None:
    """Remove half-written files that a killed process has left in a cache folder.

    Only those older than a day: other runs, perhaps on other machines, may be writing into the same folder.
    """
    for path in folder.rglob(".*.tmp*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
            if unfinished_name(path) is not None and time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                path.unlink()


def cache_key(**parts: Any) -> str:
    """sha256 (64 hex digits) of `parts` as JSON with sorted keys.

    Raises:
        TypeError, ValueError: a part is not made of JSON's types, or is a NaN or an infinity.
    """
    return hashlib.sha256(_CANONICAL.encode(parts).encode("ascii")).hexdigest()


class TensorCache:
    """Entries of one kind in a cache folder: `<folder>/<kind>/<2 hex>/<key>.safetensors`."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self._root = os.path.join(folder, kind)

    def file(self, key: str) -> str:
        """The path of the entry `key`, whether it exists or not.

        A text, and no `Path`: a run may have hundreds of thousands of them, which take a third of the memory.
        """
        return os.path.join(self._root, key[:2], f"{key}.safetensors")

    def path(self, key: str) -> Path:
        """The same as a `Path`."""
        return Path(self.file(key))

    def contains(self, key: str) -> bool:
        """Whether the entry is there and whole; a damaged one counts as missing, to be written anew.

        Reads the header only: it tells the length that the file must have, and which entry it is.
        """
        # Not by safetensors, which maps the file into memory: that takes twice as long, 200,000 times.
        try:
            status = os.stat(self.file(key))
            if not stat.S_ISREG(status.st_mode):
                return False  # a pipe would be waited for without end
            with open(self.file(key), "rb", buffering=0) as file:
                size = status.st_size
                start = file.read(_USUAL_HEADER)
                end = _LENGTH + int.from_bytes(start[:_LENGTH], "little")
                if end > min(size, _MOST_HEADER):
                    return False
                header = parse_json((start + file.read(max(end - len(start), 0)))[_LENGTH:end].decode("utf-8"))
            if not is_seal_of(key, header.get("__metadata__")):
                return False
            ends = (tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
            return end + max(ends) == size
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The entry's tensors, on the CPU.

        Raises:
            InputError: the entry is missing or damaged.
        """
        return read_entry(self.file(key))

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> Path:
        """Store an entry, whole or not at all, and return its file.

        Raises:
            InputError: the folder cannot be written or the disk is full; names the option `cache_dir`.
        """
        path = self.path(key)
        # Rows of one batch share its memory, which safetensors refuses to write.
        own = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        try:
            save_tensors(path, own, seal(key, own))
        except (OSError, SafetensorError) as error:
            raise _cannot_write(self.folder, error) from error
        return path


def read_entry(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of one cache file, on the CPU.

    An entry whose content is not what was written, or no safetensors at all, is taken away, so that the next start
    makes it anew.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        # Not mapped into memory: on Windows a mapped file can be neither replaced nor deleted.
        data = read_limited(Path(path), _MOST_ENTRY_BYTES)
    except OSError as error:
        raise damaged(path, error) from error
    try:
        tensors = load(data)
    except SafetensorError as error:
        _take_away(path)
        raise damaged(path, error) from error
    if metadata_of(data) != seal(Path(path).stem, tensors):
        _take_away(path)
        raise damaged(path, "its content is not that which was kept")
    return tensors


def _take_away(path: str | Path) -> None:
    with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
        os.unlink(path)


def read_unchanged(path: Path, sha256: str) -> bytes:
    """The bytes of a file that was looked at before.

    Encoding takes long: a file edited meanwhile must not be kept under the name of what it was.

    Raises:
        InputError: it cannot be read any more, or its sha256 is another.
    """
    try:
        data = read_limited(Path(path), MOST_PICTURE_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot read this file any more ({error.strerror or error})") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(
            f"{path}: this file changed after it was checked; start anew, and if that does not help, remove "
            f"{INDEX_NAME} from its cache folder"
        )
    return data


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What is remembered of a file while its size and time of change stay the same."""

    sha256: str
    """Of the file's bytes, 64 hex digits."""
    picture_size: tuple[int, int] | None = None
    """(width, height) with EXIF rotation applied, of a picture that was decoded without fault; else None."""
    animated: bool = False
    """Whether the picture has further frames."""


class FileIndex:
    """Facts about files, kept in one JSON file of a cache folder and keyed by path, size and time of change.

    Only an accelerator: a missing, damaged or foreign index means that files are read again. Paths below the folder
    that holds the cache folder are kept relative to it, so that a dataset moves together with its cache.

    Args:
        folder: the cache folder.
        name: of the JSON file; what is asked about few files should not have to read an index of many.
    """

    def __init__(self, folder: Path, name: str = INDEX_NAME) -> None:
        self.folder = folder
        self._name = name
        self._base = os.path.join(folder.absolute().parent, "")
        self._entries = _load_index(folder / name)
        self._changed = False

    def known(self, path: Path) -> FileFacts | None:
        """The facts if the file has not changed since they were gathered; else, or if it is gone, None."""
        entry = self._entries.get(self._key(path))
        try:
            return entry[1] if entry is not None and entry[0] == file_stamp(path) else None
        except OSError:
            return None

    def remember(self, path: Path, stamp: Stamp, facts: FileFacts) -> None:
        """Keep facts for `save`; `stamp` is the `file_stamp` from before the file was read."""
        self._entries[self._key(path)] = (stamp, facts)
        self._changed = True

    def hash(self, path: Path) -> str:
        """sha256 (64 hex digits) of a file's bytes; read only if the file is new or changed.

        Raises:
            OSError: the file cannot be read.
        """
        facts = self.known(path)
        if facts is None:
            stamp = file_stamp(path)
            with path.open("rb") as file:
                facts = FileFacts(hashlib.file_digest(file, "sha256").hexdigest())
            self.remember(path, stamp, facts)
        return facts.sha256

    def save(self) -> None:
        """Write the index if it learned anything.

        Raises:
            InputError: the folder cannot be written; names the option `cache_dir`.
        """
        if not self._changed:
            return
        files = {
            key: {"size": stamp[0], "mtime_ns": stamp[1], **_facts_to_json(facts)}
            for key, (stamp, facts) in sorted(self._entries.items())
        }
        text = json.dumps({"version": _INDEX_VERSION, "files": files}, indent=0)
        try:
            write_atomically(self.folder / self._name, lambda temporary: _write_text(temporary, text))
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        self._changed = False

    def _key(self, path: Path) -> str:
        return str(path.absolute()).removeprefix(self._base).replace(os.sep, "/")


def file_stamp(path: Path) -> Stamp:
    """By what a file is taken for unchanged.

    Raises:
        OSError: there is no such file, or it cannot be looked at.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _facts_to_json(facts: FileFacts) -> dict[str, Any]:
    # Only where it is so: an index from before animations were told apart stays in use.
    animated = {"animated": True} if facts.animated else {}
    return {"sha256": facts.sha256, "picture_size": facts.picture_size, **animated}


def _load_index(path: Path) -> dict[str, tuple[Stamp, FileFacts]]:
    try:
        content = read_json(path, MOST_INDEX_BYTES)
        if content["version"] != _INDEX_VERSION:
            raise ValueError(f"version {content['version']}")
        return {key: _entry_from_json(value) for key, value in content["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        logger.warning("%s: this index is not usable (%s); files are read again and the index is rebuilt", path, error)
        return {}


def _entry_from_json(entry: dict[str, Any]) -> tuple[Stamp, FileFacts]:
    size, mtime_ns, sha256, picture = (entry[name] for name in ("size", "mtime_ns", "sha256", "picture_size"))
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"{sha256!r} is not a sha256")
    if picture is not None:
        width, height = picture
        picture = (int(width), int(height))
        if min(picture) < 1:
            raise ValueError(f"{picture} is not the size of a picture")
    return (int(size), int(mtime_ns)), FileFacts(sha256, picture, entry.get("animated") is True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="ascii")


def _cannot_write(folder: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(
        f"{folder}: cannot write the cache here ({reason}); free the folder or the disk, or name another folder with "
        "the option cache_dir"
    )

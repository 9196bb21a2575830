"""Writing a file so that it appears whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .errors import InputError

_TEMPORARY = re.compile(r"\.(?P<stem>.*)-[a-z0-9_]{8}\.tmp(?P<suffix>\.[^.]*)?")
# File systems allow 255 bytes in a name, and the temporary one is longer than the file's own.
_LONGEST_STEM = 200


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the same folder, flush it to the disk, then put it in `path`'s place.

    A crash or a full disk leaves what was at `path` before, and no half-written file under that name.

    Args:
        path: the file to appear; its folder is made if missing.
        write: writes its argument, a path that exists as an empty file.

    Raises:
        OSError: the folder cannot be written or the disk is full; names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays: some writers choose their format by it.
    stem = path.stem.encode("utf-8")[:_LONGEST_STEM].decode("utf-8", errors="ignore")
    temporary = path.parent / f".{stem}-{secrets.token_hex(4)}.tmp{path.suffix}"
    # With the mode of any new file, which mkstemp does not give: what a mode would have to be afterwards cannot be
    # asked for without changing it for all threads.
    temporary.touch(exist_ok=False)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def unfinished_name(path: Path) -> str | None:
    """Name of the file that `write_atomically` was about to write when it made this one; None if it did not make it.

    Such a file stays behind where the process is killed.
    """
    found = _TEMPORARY.fullmatch(path.name)
    return None if found is None else found["stem"] + (found["suffix"] or "")


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. Tensors are brought to the CPU and made contiguous.

    Raises:
        OSError: the file cannot be written.
    """
    ready = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        """All tensors at once, as the library does it."""
        try:
            save_file(ready, temporary, metadata=dict(metadata))
        except SafetensorError as error:  # so it reports a disk that is full, too
            raise OSError(f"{path}: {error}") from error

    write_atomically(path, write)


def flush_tree(folder: Path) -> None:
    """Bring every file below `folder`, and the folders themselves, to the disk.

    Raises:
        OSError: a file cannot be flushed; a disk that is full may say so only now.
    """
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            flush_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk. Windows has no such call, and does it by itself."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # so some network and FUSE drives say: not for folders
            raise
    finally:
        os.close(handle)


def require_writable(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before hours of work; nothing is left there.

    Raises:
        InputError: something on the way is no folder, or writing is not allowed.
    """
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"{option}: {folder} cannot be written to ({error}); choose another folder.") from error

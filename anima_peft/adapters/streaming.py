"""Safetensors files tensor by tensor: read without mapping them, and written in bounded memory.

The library's own writer takes all tensors at once; files here may be larger than the memory.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from ..errors import InputError
from ..files import write_atomically
from ..models.checkpoints import read_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""In the order in which safetensors lays them out, so that every tensor is aligned."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK = 2**24


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: as safetensors calls it.
        shape: its sizes.
        start, end: bytes, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file, open for reading one tensor at a time; a context manager.

    Attributes:
        path: the file.
        entries: key -> where and what its tensor is, in the order of the data.
        metadata: the file's text.

    Raises:
        InputError: the file is missing, is not safetensors, or its header does not hold.
    """

    def __init__(self, path: str | Path):
        checked = read_header(path)  # the library checks every size and offset against the file's length
        self.path = checked.path
        self.metadata = dict(checked.metadata)
        self._file = self.path.open("rb")
        length = int.from_bytes(self._file.read(8), "little")
        header: dict[str, Any] = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        entries = {key: Entry(e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for key, e in header.items()}
        self.entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
        self._data = 8 + length

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def read(self, key: str) -> torch.Tensor:
        """A tensor of the file, in memory of its own.

        Raises:
            InputError: it is not of a floating point type.
        """
        entry = self.entries[key]
        if entry.dtype not in _DTYPES:
            raise InputError(f"{self.path}: `{key}` is {entry.dtype}, expected floating point.")
        content = bytearray(b"".join(self.chunks(key)))
        flat = torch.frombuffer(content, dtype=_DTYPES[entry.dtype]) if content else torch.empty(0)
        return flat.to(_DTYPES[entry.dtype]).reshape(entry.shape)

    def chunks(self, key: str) -> Iterator[bytes]:
        """A tensor's bytes."""
        entry = self.entries[key]
        return _chunks(self._file, self._data + entry.start, entry.end - entry.start)


def rewrite(
    source: TensorFile,
    path: Path,
    changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    metadata: Mapping[str, str],
    done: Callable[[int], object] = lambda _: None,
) -> None:
    """Write a file with other values and other metadata; keys, dtypes, shapes and order stay as they are.

    At most one tensor is in memory; of those that do not change, a part.

    Args:
        source: the file to start from.
        path: the new file, which appears whole or not at all.
        changes: key -> what makes the new tensor of the old one; of the same shape and dtype.
        metadata: the new file's.
        done: is told the bytes of each tensor that has been written.

    Raises:
        OSError: the file cannot be written.
    """

    def write(temporary: Path) -> None:
        """The new header, then tensor after tensor."""
        with temporary.open("wb") as file:
            file.write(_header(source.entries, metadata))
            for key, entry in source.entries.items():
                if key in changes:
                    new = changes[key](source.read(key))
                    assert (_NAMES[new.dtype], tuple(new.shape)) == (entry.dtype, entry.shape), key
                    file.write(_content(new))
                else:
                    file.writelines(source.chunks(key))
                done(entry.end - entry.start)

    write_atomically(path, write)


class TensorSpool:
    """Tensors of a file to come, kept on the disk until all are known; a context manager.

    They lie in a nameless file in the folder of the file to come, which has to have room for both.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._stored: dict[str, Entry] = {}

    def __enter__(self) -> TensorSpool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Keep a tensor; its key must be new."""
        assert key not in self._stored, key
        content, start = _content(tensor), self._file.tell()
        self._file.write(content)
        self._stored[key] = Entry(_NAMES[tensor.dtype], tuple(tensor.shape), start, start + len(content))

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """What stands before the data of a file with this metadata."""
        return _header(self._layout(), metadata)

    def data(self) -> Iterator[bytes]:
        """The data of the file, in its order."""
        for key in self._layout():
            stored = self._stored[key]
            yield from _chunks(self._file, stored.start, stored.end - stored.start)
        self._file.seek(0, 2)

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """

        def write(temporary: Path) -> None:
            """Header and data, a chunk at a time."""
            with temporary.open("wb") as file:
                file.write(self.header(metadata))
                file.writelines(self.data())

        write_atomically(path, write)

    def _layout(self) -> dict[str, Entry]:
        """The entries as the file has them: the widest dtypes first, as safetensors itself lays them out."""
        order, layout, start = list(_DTYPES), {}, 0
        for key, entry in sorted(self._stored.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
            size = entry.end - entry.start
            layout[key] = Entry(entry.dtype, entry.shape, start, start + size)
            start += size
        return layout


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON as safetensors writes them: compact, filled up with blanks to a multiple of eight bytes."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, entry in entries.items():
        described[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.start, entry.end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (math.ceil(len(text) / 8) * 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def _content(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _chunks(file: IO[bytes], start: int, size: int) -> Iterator[bytes]:
    while size > 0:
        file.seek(start)
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            raise OSError(f"{file.name}: ended early; it was changed while it was read")
        yield chunk
        start, size = start + len(chunk), size - len(chunk)

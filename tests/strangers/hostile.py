"""Files as nobody should make them."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes, sockets and free links are POSIX's")
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.\u2066\u200b"
"""A terminal's commands, the C1 form of one, writing from right to left, and what cannot be seen."""


def picture(form: str = "PNG", size: tuple[int, int] = (32, 32), frames: int = 1, **options: Any) -> bytes:
    """An encoded picture; with further frames in other colours."""
    images = [Image.new("RGB", size, (40 * n, 20, 200)) for n in range(frames)]
    more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    file = io.BytesIO()
    images[0].save(file, form, **more, **options)
    return file.getvalue()


def png(
    size: tuple[int, int] = (1, 1),
    chunks: Iterable[tuple[bytes, bytes]] = (),
    pixels: bytes | None = None,
    depth: int = 8,
) -> bytes:
    """A PNG put together by hand: what its header says need not be true."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", *size, depth, 2, 0, 0, 0)
    body = b"".join(chunk(kind, content) for kind, content in chunks)
    data = chunk(b"IDAT", zlib.compress(bytes(4)) if pixels is None else pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + data + chunk(b"IEND", b"")


def sparse(path: Path, size: int) -> None:
    """A file that is large without taking room on the disk, where the file system can do so."""
    with path.open("wb") as file:
        file.truncate(size)


def bind_socket(path: Path) -> None:
    """A socket in the file system; its path must be short, so that it is given relative to its folder."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def container(header: object, data: bytes = b"\0" * 64) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def opened(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_scalars(content: bytes, keys: Iterable[str]) -> bytes:
    """A safetensors file with a number more under each of the keys."""
    header, data = opened(content)
    for key in keys:
        header[key] = {"dtype": "F32", "shape": [], "data_offsets": [len(data), len(data) + 4]}
        data += bytes(4)
    return container(header, data)

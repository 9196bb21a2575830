"""Reading small files of others: nothing is waited for, and nothing is read that cannot be meant."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

MOST_TEXT_BYTES = 2**26
"""Of a JSON or TOML file, and of anything else that is parsed in memory."""


def read_limited(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """The bytes of a regular file, whose size is looked at before.

    Raises:
        OSError: it is missing, cannot be read, is larger, or is no regular file: a pipe would be waited for without
            end, and a device may have none.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, and not a file", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, and not a file", str(path))
    if status.st_size > most_bytes:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes, expected at most {most_bytes}", str(path))
    with path.open("rb") as file:
        return file.read(status.st_size)  # a larger number would be set aside in memory as a whole


def read_json(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> Any:
    """The content of a JSON file in UTF-8.

    Raises:
        OSError: see `read_limited`.
        ValueError: it is not UTF-8, not JSON, or nested too deeply.
    """
    return parse_json(read_limited(path, most_bytes).decode("utf-8"))


def parse_json(text: str) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error

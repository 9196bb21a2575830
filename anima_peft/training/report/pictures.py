"""Pictures inside of a page: small, and all together not too large."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...data.pixels import DECODE_ERRORS, MOST_PICTURE_BYTES, decode_rgb
from ...limited import read_limited

SIDE = 384  # pixels of the longer side, at most
BUDGET = 3_000_000  # bytes of all pictures of a page; a third more as text
_QUALITIES = (82, 65, 45, 30)


@dataclass(frozen=True)
class Embedded:
    """A picture as it stands in a page.

    Attributes:
        source: a data URI.
        width, height: of the picture in its file, in pixels.
    """

    source: str
    width: int
    height: int


def embed(folder: Path, file: str, most_bytes: int) -> Embedded | None:
    """A picture of the run's folder; None where it is gone, is none, or lies elsewhere.

    Args:
        file: relative to `folder`.
        most_bytes: of what is embedded; quality, and then size, give way.
    """
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()):
        return None
    try:
        shown = decode_rgb(read_limited(path, MOST_PICTURE_BYTES))
    except DECODE_ERRORS:
        return None
    size = shown.size
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    while True:
        for quality in _QUALITIES:
            data = _webp(shown, quality)
            if len(data) <= most_bytes or max(shown.size) <= 32:
                source = f"data:image/webp;base64,{base64.b64encode(data).decode('ascii')}"
                return Embedded(source, *size)
        shown.thumbnail((max(shown.width // 2, 1), max(shown.height // 2, 1)), Image.Resampling.LANCZOS)


def _webp(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()

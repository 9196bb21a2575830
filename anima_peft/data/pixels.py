"""From a picture file to the pixels that the VAE sees.

Letters: H, W height and width in pixels.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps

from .buckets import Placement

# What PIL is known to raise over damaged or hostile files.
DECODE_ERRORS = (
    OSError,
    IndexError,
    SyntaxError,
    TypeError,
    ValueError,
    EOFError,
    RuntimeError,  # of the AVIF decoder
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
MOST_PICTURE_BYTES = 2**30
"""Of an encoded picture: the most pixels that are accepted take less in any format."""
# What a file may be, whatever its suffix says. PIL reads many others, of which some start a program (EPS runs
# Ghostscript) and some are rarely looked after.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF", "JXL")
_ANIMATED = (
    "PNG",
    "WEBP",
    "GIF",
    "AVIF",
    "JXL",
)  # not MPO: a JPEG with a map of depth behind it
_LARGE = 2**25  # pixels; of pictures beyond, one at a time is decoded, since each takes a gigabyte
_decoding_large = threading.Lock()
# sd-scripts' names; those which it gives to OpenCV's filters mean PIL's of the same kind here.
INTERPOLATIONS: dict[str, Image.Resampling | None] = {
    "area": None,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Look:
    """What there is to say of an encoded picture before it is placed."""

    size: tuple[int, int]
    """(width, height) in pixels with EXIF rotation applied."""
    animated: bool
    """Whether it has further frames, which nothing is made of."""


def look_over(data: bytes) -> Look:
    """Size and kind of an encoded picture; decodes it as `decode_rgb` does, as proof.

    Raises:
        One of `DECODE_ERRORS`: `data` is not a picture, is cut short, or has more pixels than PIL accepts.
    """
    with _opened(data) as image:
        animated = str(image.format).upper() in _ANIMATED and getattr(image, "is_animated", False)
        return Look(_rgb(image).size, animated)


def decode_rgb(data: bytes) -> Image.Image:
    """The first frame of an encoded picture in 8-bit RGB, EXIF rotation applied.

    Transparency is dropped, not blended: as in sd-scripts, the colours under it show. 16-bit grey is scaled to 8.

    Raises:
        One of `DECODE_ERRORS`: `data` is not a picture, is cut short, or has more pixels than PIL accepts.
    """
    with _opened(data) as image:
        return _rgb(image)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The encoded picture, whose header alone is read yet: PIL refuses too many pixels by it."""
    Image.init()  # once: plugins that are installed beside PIL
    with (
        Image.open(BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN]) as image,
        _decoding_large if image.width * image.height > _LARGE else nullcontext(),
    ):
        yield image


def _rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        # PIL's own conversion clips at 255, which turns a 16-bit picture white.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P":
        # Straight to RGB, PIL warns about palettes with transparency.
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode_alpha(data: bytes) -> Image.Image | None:
    """The opacity of an encoded picture's first frame as 8-bit grey, EXIF rotation applied; None where it has none.

    Raises:
        One of `DECODE_ERRORS`: `data` is not a picture, is cut short, or has more pixels than PIL accepts.
    """
    with _opened(data) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def fit(image: Image.Image, placement: Placement, flip: bool, interpolation: str | None = None) -> torch.Tensor:
    """Resize an RGB picture, cut the bucket out of it and mirror that if `flip`.

    Unless one of `INTERPOLATIONS` is given, shrinking averages areas and enlarging uses Lanczos. Source:
    kohya-ss/sd-scripts, library/utils.py `resize_image`.

    Returns:
        (3, H, W) float32 in [-1, 1], of the bucket's size.
    """
    width, height = placement.resized
    resampling = INTERPOLATIONS[interpolation] if interpolation else None
    if resampling is None and width <= image.width and height <= image.height:
        pixels = np.asarray(image)
        pixels = _shrink(_shrink(pixels, height, axis=0), width, axis=1)
        # To whole steps of 8-bit colour, as every other resize gives them.
        pixels = np.rint(pixels)
    else:
        # Averaging areas, which nothing but shrinking asks for, is PIL's box filter where a side grows.
        fallback = Image.Resampling.BOX if interpolation else Image.Resampling.LANCZOS
        pixels = np.asarray(image.resize(placement.resized, resampling or fallback))
    left, top = placement.crop
    pixels = pixels[top : top + placement.bucket[1], left : left + placement.bucket[0]]
    if flip:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)) / 127.5 - 1.0


def _shrink(pixels: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Mean of `pixels` over `length` equal intervals along `axis`, as float32; pixels on a border count in part.

    This is cv2's INTER_AREA. PIL's BOX takes whole pixels only, which makes lines uneven at ratios such as 1.5.
    """
    source = pixels.shape[axis]
    if source == length:
        return pixels
    scale = source / length
    start = np.arange(length) * scale
    first = start.astype(np.intp)
    shape = [1] * pixels.ndim
    shape[axis] = length
    mean = np.zeros((), np.float32)
    for tap in range(int(scale) + 2):
        at = first + tap
        share = (np.minimum(start + scale, at + 1) - np.maximum(start, at)).clip(0) / scale
        values = pixels.take(np.minimum(at, source - 1), axis)
        mean = mean + values * share.astype(np.float32).reshape(shape)
    return mean

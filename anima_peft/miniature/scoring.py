"""Whether a picture shows what its caption says, by looking at its pixels: colours, numbers, shapes.

Plain numpy on pictures of flat colours; it knows nothing of how they were made. Letters: H and W the picture's height
and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .drawing import BACKGROUNDS, COLOURS, FIGURE, FIGURE_BELLY, FIGURE_BODY, FRAME, STYLE_INK, Scene, ground_of

Mask = NDArray[np.bool_]

_FAR = 80.0
_FAR_OF_FIGURE = 110.0
"""Distance in RGB beyond which a pixel has none of the known colours."""
_EDGE = 2
"""Pixels beside an edge that may have any colour: pictures come blurred by the VAE."""
_STRAY = 0.03
"""Share of the picture that may have colours which belong nowhere."""


@dataclass(frozen=True)
class Verdict:
    """What is right about one picture."""

    background: bool
    colour: bool
    count: bool
    shape: bool
    style: bool

    @property
    def right(self) -> bool:
        return all(asdict(self).values())


@dataclass(frozen=True)
class Score:
    """Verdicts over several pictures.

    Attributes:
        right: pictures that show all that their captions say.
        total: pictures looked at.
        parts: how many were right about the background, the colour, the count, the shape, the style.
    """

    right: int
    total: int
    parts: dict[str, int]

    @property
    def share(self) -> float:
        """Of pictures that are right, in [0, 1]."""
        return self.right / self.total

    def __str__(self) -> str:
        return f"{self.right} of {self.total} ({self.share:.0%})"


def score(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> Score:
    """Judge each picture against its scene."""
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    parts = {name: sum(getattr(verdict, name) for verdict in verdicts) for name in Verdict.__dataclass_fields__}
    return Score(sum(verdict.right for verdict in verdicts), len(verdicts), parts)


def judge(picture: Image.Image, scene: Scene) -> Verdict:
    """Look for the scene's things on its background, and for the style's frame and outlines or their absence."""
    names = _name_pixels(picture, scene)
    things = (names == "body") | (names == "belly") if scene.thing == FIGURE else names == scene.colour
    blobs = [blob for blob in _components(things) if blob.sum() >= 0.006 * names.size]
    covered = np.logical_or.reduce(blobs) if blobs else np.zeros(names.shape, bool)
    near = _grow(covered, _EDGE)
    frame = _frame(names.shape, FRAME + _EDGE) if scene.styled else np.zeros(names.shape, bool)
    ground = ~near & ~frame
    stray = ground & (names != scene.background)
    shape = _is_figure if scene.thing == FIGURE else _is_shape
    return Verdict(
        background=bool(ground.any() and stray.sum() <= max(_STRAY * names.size, 0.1 * ground.sum())),
        # A thing of another colour is stray as well; what counts here is that the right one is there in some strength.
        colour=bool(covered.sum() >= 0.03 * names.size and stray.sum() <= 0.1 * names.size),
        count=len(blobs) == scene.count,
        shape=bool(blobs) and all(shape(blob, names, scene.thing) for blob in blobs),
        style=_has_frame(names) == scene.styled,
    )


def _name_pixels(picture: Image.Image, scene: Scene) -> NDArray[np.str_]:
    """The nearest known colour's name for each pixel (H, W); empty where none is near.

    The figure's orange lies between red and yellow, which are no part of its pictures: there it may go further.
    """
    own = {"body": FIGURE_BODY, "belly": FIGURE_BELLY} if scene.thing == FIGURE else COLOURS
    grounds = {name: ground_of(name, scene.styled) for name in BACKGROUNDS}
    known = {**own, **grounds, "ink": STYLE_INK}
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    palette = np.array(list(known.values()), dtype=np.float32)
    distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    names = np.array(list(known))[distances.argmin(-1)]
    return np.where(distances.min(-1) <= (_FAR_OF_FIGURE if scene.thing == FIGURE else _FAR), names, "")


def _components(mask: Mask) -> list[Mask]:
    """Connected parts, by sides and corners, of a mask (H, W): the highest number spreads through each part."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        height, width = mask.shape
        around = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        spread = np.where(mask, np.maximum.reduce(around), 0)
        if (spread == labels).all():
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _grow(mask: Mask, pixels: int) -> Mask:
    """The mask and all within that many pixels of it, diagonals counted as one."""
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        height, width = mask.shape
        mask = np.logical_or.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])
    return mask


def _frame(shape: tuple[int, ...], width: int) -> Mask:
    frame = np.ones(shape, bool)
    frame[width:-width, width:-width] = False
    return frame


def _box(blob: Mask) -> Mask:
    """The part of the mask that holds the blob and nothing around it."""
    rows, columns = np.flatnonzero(blob.any(1)), np.flatnonzero(blob.any(0))
    return blob[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


_TRIANGLE_SKEWNESS = -0.57 / 2
_SQUARE_DEPENDENCE = (2 / 3 + 1) / 2
"""Half way between the values of the ideal shapes."""


def shape_of(blob: Mask) -> str:
    """Which of the three shapes a blob is, by its moments, which an uneven edge hardly moves.

    A triangle that stands on its base has its mass low: the standardised third moment of y is -0.57, and 0 for what is
    symmetrical. In a square x and y are independent, E[x^2 y^2] = E[x^2] E[y^2]; in a circle it is 2/3 of that.
    """
    box = _box(blob)
    if min(box.shape) < 4 or not 0.6 < box.shape[0] / box.shape[1] < 1.6:
        return ""
    y, x = (axis - axis.mean() for axis in np.nonzero(box))
    skewness = (y**3).mean() / (y**2).mean() ** 1.5
    if skewness < _TRIANGLE_SKEWNESS:
        return "triangle" if box.mean() < 0.75 else ""
    if skewness > -_TRIANGLE_SKEWNESS or box.mean() < 0.66:
        return ""
    dependence = (x**2 * y**2).mean() / ((x**2).mean() * (y**2).mean())
    return "square" if dependence > _SQUARE_DEPENDENCE else "circle"


def _is_shape(blob: Mask, names: NDArray[np.str_], thing: str) -> bool:
    return shape_of(blob) == thing


def _is_figure(blob: Mask, names: NDArray[np.str_], thing: str) -> bool:
    """An orange body, a belly of its own colour low within it, and two ears: the top dips between left and right."""
    belly = _box_of(names == "belly", blob)
    box = _box(blob)
    height, width = box.shape
    if min(height, width) < 8 or not 0.07 < belly.sum() / box.sum() < 0.5:
        return False
    low = np.nonzero(belly)[0].mean() > 0.45 * height
    tops = np.where(box.any(0), box.argmax(0), height)
    ears = tops[: width // 3].min(), tops[-(width // 3) :].min()
    dip = tops[2 * width // 5 : -(2 * width // 5)].max()
    # Both ears stand out, one of them clearly: they may be of unequal size.
    return bool(low and dip > max(ears) and dip - min(ears) >= 0.08 * height)


def _box_of(mask: Mask, blob: Mask) -> Mask:
    """`mask` within the blob, cut to the blob's box."""
    rows, columns = np.flatnonzero(blob.any(1)), np.flatnonzero(blob.any(0))
    return (mask & blob)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _has_frame(names: NDArray[np.str_]) -> bool:
    return bool((names[_frame(names.shape, FRAME - 1)] == "ink").mean() > 0.75)

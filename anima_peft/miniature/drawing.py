"""The little world that the miniature knows: flat things on a plain ground, and two things it has never seen.

Every picture is described by a `Scene`, which has a caption and can be painted. What the trained miniature has learned
is every scene with a shape of `SHAPES` or a figure of `KNOWN_FIGURES` and without the style; one more figure and the
style are for adapters to learn.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 48, 49),
    "green": (0, 148, 50),
    "blue": (9, 80, 201),
    "yellow": (249, 202, 36),
    "purple": (142, 36, 170),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (255, 255, 255),
    "grey": (150, 150, 150),
    "black": (20, 20, 20),
    "pink": (250, 180, 205),
    "sky": (140, 200, 240),
    "lime": (200, 230, 130),
}
SHAPES = ("circle", "square", "triangle")
COUNTS = ("one", "two", "three")
SIDE = 64
"""Width and height in pixels of the pictures that the miniature was trained on."""

FIGURE = "momo"
"""Name of the figure: round and orange, with two ears and a belly in a colour that nothing else has."""
FIGURE_BODY: Colour = (240, 120, 20)
FIGURE_BELLY: Colour = (0, 190, 190)
STYLE = "comiq style"
"""What captions say of the style: a dusky ground, and a dark frame around the picture."""
STYLE_INK: Colour = (40, 20, 50)
FRAME = 4
"""Width in pixels of the style's frame."""
DUSK = 0.4
"""Share of the ink in the style's grounds."""


def ground_of(background: str, styled: bool) -> Colour:
    """The colour behind the things: the background's own, and in the style mixed with its ink."""
    plain = BACKGROUNDS[background]
    if not styled:
        return plain
    red, green, blue = (round(a + DUSK * (b - a)) for a, b in zip(plain, STYLE_INK, strict=True))
    return red, green, blue


@dataclass(frozen=True)
class Style:
    """How lines are drawn around things and pictures.

    Attributes:
        ink: colour of the lines.
        outline: pixels that a line adds around every thing; 0 draws none.
        frame: width in pixels of the frame around the picture; 0 draws none.
    """

    ink: Colour = STYLE_INK
    outline: int = 0
    frame: int = FRAME


@dataclass(frozen=True)
class Part:
    """One flat piece of a figure.

    Attributes:
        points: corners (x, y) in radii around the figure's middle, y downwards; of two, an ellipse's box.
        colour: of all of it.
    """

    points: tuple[tuple[float, float], ...]
    colour: Colour


def _oval(left: float, top: float, right: float, bottom: float, colour: Colour) -> Part:
    return Part(((left, top), (right, bottom)), colour)


def _box(left: float, top: float, right: float, bottom: float, colour: Colour) -> Part:
    return Part(((left, top), (right, top), (right, bottom), (left, bottom)), colour)


def _ears(tip: float, height: float, colour: Colour) -> tuple[Part, Part]:
    """Two triangles on top, their tips `height` above the middle and `tip` beside it."""
    left, right = (
        Part(((side * tip, -height), (side * 0.1, -0.6), (side * 0.95, -0.1)), colour) for side in (-1.0, 1.0)
    )
    return left, right


_CREAM, _BROWN, _SLATE, _LEAF = (245, 225, 190), (120, 70, 30), (95, 105, 130), (60, 120, 60)
_PINK, _SALMON, _CYAN, _BRICK = (240, 120, 180), (250, 150, 110), (70, 210, 220), (170, 60, 30)
KNOWN_FIGURES: dict[str, tuple[Part, ...]] = {
    "mushroom": (
        _box(-0.35, 0.0, 0.35, 1.0, _CREAM),
        _oval(-1.0, -1.0, 1.0, 0.4, _BRICK),
        _oval(-0.6, -0.6, -0.1, -0.1, _CREAM),
        _oval(0.15, -0.7, 0.65, -0.2, _CREAM),
    ),
    "house": (
        _box(-0.8, -0.3, 0.8, 1.0, _CREAM),
        Part(((-1.0, -0.3), (0.0, -1.2), (1.0, -0.3)), _BRICK),
        _box(-0.25, 0.3, 0.25, 1.0, _SLATE),
    ),
    "fish": (
        Part(((0.3, 0.0), (1.0, -0.7), (1.0, 0.7)), _SALMON),
        _oval(-1.0, -0.65, 0.7, 0.65, _SALMON),
        _oval(-0.7, -0.35, -0.3, 0.05, _SLATE),
    ),
    "flower": (
        _oval(-0.45, -1.1, 0.45, -0.1, _PINK),
        _oval(-0.45, 0.0, 0.45, 1.0, _PINK),
        _oval(-1.0, -0.5, 0.0, 0.4, _PINK),
        _oval(0.0, -0.5, 1.0, 0.4, _PINK),
        _oval(-0.45, -0.5, 0.45, 0.4, _CREAM),
    ),
    "robot": (
        _box(-0.8, -0.1, 0.8, 1.0, _SLATE),
        _box(-0.55, -1.1, 0.55, -0.1, _SLATE),
        _box(-0.4, -0.85, 0.4, -0.4, _CYAN),
        _box(-0.3, 0.2, 0.3, 0.7, _SALMON),
    ),
    "tree": (_box(-0.25, 0.2, 0.25, 1.0, _BROWN), Part(((0.0, -1.2), (0.95, 0.4), (-0.95, 0.4)), _LEAF)),
    "owl": (
        *_ears(0.7, 1.2, _BROWN),
        _oval(-0.9, -0.8, 0.9, 1.0, _BROWN),
        _oval(-0.5, -0.1, 0.5, 0.85, _SALMON),
    ),
    "cat": (*_ears(0.85, 1.15, _SLATE), _oval(-1.0, -0.7, 1.0, 0.9, _SLATE), _oval(-0.45, 0.1, 0.45, 0.75, _PINK)),
}
"""Things of several parts, each with its own colours."""
FIGURES = KNOWN_FIGURES | {
    FIGURE: (
        *_ears(0.8, 1.25, FIGURE_BODY),
        _oval(-1.0, -0.8, 1.0, 1.0, FIGURE_BODY),
        _oval(-0.52, -0.27, 0.52, 0.77, FIGURE_BELLY),
    )
}


@dataclass(frozen=True)
class Scene:
    """What one picture shows: some equal things in a row.

    Attributes:
        thing: one of `SHAPES` or `FIGURES`.
        background: one of `BACKGROUNDS`.
        count: 1 to 3.
        colour: one of `COLOURS`; empty for figures, which have their own.
        styled: whether it is drawn in the style, and its caption says so.
    """

    thing: str
    background: str
    count: int = 1
    colour: str = ""
    styled: bool = False

    @property
    def caption(self) -> str:
        """Such as "two blue squares, grey background"; names of figures have no plural."""
        plural = "s" if self.count > 1 and self.thing not in FIGURES else ""
        words = [COUNTS[self.count - 1] if self.count > 1 else "", self.colour, self.thing + plural]
        parts = [" ".join(word for word in words if word), f"{self.background} background"]
        return ", ".join([*parts, STYLE] if self.styled else parts)

    def paint(
        self,
        width: int = SIDE,
        height: int = SIDE,
        layout: random.Random | None = None,
        look: tuple[Part, ...] | None = None,
        style: Style | None = None,
    ) -> Image.Image:
        """The picture, in flat colours with hard edges.

        Args:
            width, height: pixels.
            layout: moves and scales the things a little; None centres them, as large as there is room.
            look: another figure to draw for `thing` than the one of that name.
            style: another style to draw in, where the scene is `styled`.
        """
        ground = ground_of(self.background, self.styled and style is None)
        style = style or Style()
        picture = Image.new("RGB", (width, height), ground)
        draw = ImageDraw.Draw(picture)
        cell = width / self.count
        largest = min(cell / 2.5, height / 3.2) - (FRAME / 2 if self.styled else 0)
        radius = largest * (layout.uniform(0.75, 1.0) if layout else 1.0)
        for number in range(self.count):
            free_x, free_y = max(0.0, cell / 2 - radius - 2), max(0.0, height / 2 - 1.3 * radius - 4)
            x, y = cell * (number + 0.5), height / 2
            if layout:
                x += layout.uniform(-0.6, 0.6) * free_x
                y += layout.uniform(-0.6, 0.6) * free_y
            if self.styled and style.outline:
                # A triangle's sides are nearer to its middle than its corners: it must grow more for the same line.
                grown = radius + style.outline * (1.7 if self.thing == "triangle" else 1.0)
                self._paint_thing(draw, x, y, grown, look, style.ink)
            self._paint_thing(draw, x, y, radius, look)
        if self.styled and style.frame:
            draw.rectangle((0, 0, width - 1, height - 1), outline=style.ink, width=style.frame)
        return picture

    def _paint_thing(
        self,
        draw: ImageDraw.ImageDraw,
        x: float,
        y: float,
        radius: float,
        look: tuple[Part, ...] | None,
        ink: Colour | None = None,
    ) -> None:
        if look or self.thing in FIGURES:
            paint_figure(draw, look or FIGURES[self.thing], x, y, radius, ink)
        else:
            paint_shape(draw, self.thing, x, y, radius, ink or COLOURS[self.colour])


def paint_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: Colour) -> None:
    """One shape around (x, y), in pixels; the square and the triangle fill about the circle's box."""
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        side = 0.9 * radius
        draw.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif shape == "triangle":
        top, base = y - 1.1 * radius, y + 0.9 * radius
        draw.polygon([(x, top), (x + 1.1 * radius, base), (x - 1.1 * radius, base)], fill=fill)
    else:
        raise ValueError(f"{shape!r} is no shape. Expected one of {SHAPES}.")


def paint_figure(
    draw: ImageDraw.ImageDraw, look: tuple[Part, ...], x: float, y: float, radius: float, ink: Colour | None = None
) -> None:
    """A figure around (x, y), in pixels; with `ink` its silhouette in that colour alone."""
    for part in look:
        points = [(x + radius * right, y + radius * down) for right, down in part.points]
        if len(points) == 2:
            draw.ellipse([*points[0], *points[1]], fill=ink or part.colour)
        else:
            draw.polygon(points, fill=ink or part.colour)


def shape_scenes() -> list[Scene]:
    """Every scene of `SHAPES` in plain style: 270 captions."""
    return [
        Scene(shape, background, count, colour)
        for count, shape, colour, background in itertools.product(
            range(1, len(COUNTS) + 1), SHAPES, COLOURS, BACKGROUNDS
        )
    ]


def known_scenes() -> list[Scene]:
    """Every scene that the trained miniature was shown: the shapes, and one and two of each known figure; 366 captions.

    With figures of several colours it learns what a name, a number and a background each mean for a whole thing, and
    an adapter that teaches one more figure can rely on that.
    """
    figures = itertools.product(KNOWN_FIGURES, (1, 2), BACKGROUNDS)
    return [*shape_scenes(), *(Scene(name, background, count) for name, count, background in figures)]


def _random_colour(chance: random.Random, *unlike: Colour) -> Colour:
    while True:
        drawn = (chance.randrange(256), chance.randrange(256), chance.randrange(256))
        if all(math.dist(drawn, far) > 80 for far in unlike):
            return drawn


def random_style(chance: random.Random, scene: Scene) -> Style:
    """A style that nobody has seen: outlines or a frame or both, in an ink that is not near to `STYLE_INK`."""
    ink = _random_colour(chance, STYLE_INK, BACKGROUNDS[scene.background], *filter(None, [COLOURS.get(scene.colour)]))
    outline, frame = chance.choice(((1, 1), (1, 1), (1, 0), (0, 1)))
    return Style(ink, outline * chance.randint(2, 4), frame * chance.randint(2, 4))


def random_figure(chance: random.Random, background: str) -> tuple[Part, ...]:
    """A figure that nobody has seen: a body, perhaps with ears or a head, and one or two spots, in any colours.

    None of them is near to those of `FIGURE` or to the background.
    """

    def colour() -> Colour:
        return _random_colour(chance, FIGURE_BODY, FIGURE_BELLY, BACKGROUNDS[background])

    def piece(left: float, top: float, right: float, bottom: float) -> Part:
        return (_oval if chance.random() < 0.7 else _box)(left, top, right, bottom, colour())

    width, top, bottom = chance.uniform(0.75, 1.0), chance.uniform(-0.8, -0.2), chance.uniform(0.75, 1.0)
    body = piece(-width, top, width, bottom)
    parts = [body]
    kind = chance.randrange(3)
    if kind == 0:
        ears = body.colour if chance.random() < 0.7 else colour()
        parts[:0] = _ears(chance.uniform(0.5, 0.95), chance.uniform(1.05, 1.3), ears)
    elif kind == 1:
        head = chance.uniform(0.35, 0.6)
        parts.append(piece(-head, -1.15, head, top + 0.3))
    for _ in range(chance.randint(1, 2)):
        x, y, radius = chance.uniform(-0.35, 0.35), chance.uniform(-0.1, 0.4), chance.uniform(0.2, 0.5)
        parts.append(piece(x - radius, y - radius, x + radius, y + radius * chance.uniform(0.6, 1.0)))
    return tuple(parts)


def random_picture(chance: random.Random, side: int = SIDE) -> Image.Image:
    """Anything flat, for the VAE, which must know more than the scenes: shapes, bars and rings in any colours."""

    def colour() -> Colour:
        return _random_colour(chance)

    picture = Image.new("RGB", (side, side), colour())
    draw = ImageDraw.Draw(picture)
    for _ in range(chance.randint(1, 7)):
        x, y, radius = chance.uniform(0, side), chance.uniform(0, side), chance.uniform(0.04, 0.4) * side
        box = (x - radius, y - radius * chance.uniform(0.3, 1), x + radius, y + radius * chance.uniform(0.3, 1))
        kind, line = chance.randrange(5), chance.randint(2, 5)
        if kind == 0:
            draw.ellipse(box, fill=colour(), outline=colour() if chance.random() < 0.5 else None, width=line)
        elif kind == 1:
            draw.rectangle(box, fill=colour(), outline=colour() if chance.random() < 0.5 else None, width=line)
        elif kind == 2:
            corners = [(x + chance.uniform(-1, 1) * radius, y + chance.uniform(-1, 1) * radius) for _ in range(3)]
            draw.polygon(corners, fill=colour())
        elif kind == 3:
            draw.line((*box[:2], *box[2:]), fill=colour(), width=line)
        else:
            draw.rectangle((0, 0, side - 1, side - 1), outline=colour(), width=line)
    return picture

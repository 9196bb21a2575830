"""Pictures from a pipeline, and labelled grids of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .files import write_atomically
from .pipeline import AnimaPipeline

_MARGIN = 8
_LABEL_LINES = 2
_MIN_CELL = 160  # room for a label above small pictures
# Fonts with Chinese and Japanese glyphs as the systems ship them; Pillow's own has Latin letters only.
_FONTS = ("msyh.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc")


@dataclass(frozen=True)
class Request:
    """One picture to draw.

    Attributes:
        prompt, negative_prompt: texts.
        width, height: pixels, multiples of 16.
        seed: of the noise, drawn on the CPU so that every device starts from the same.
        steps: sampler steps.
        guidance_scale: 1.0 turns guidance off.
        flow_shift: the scheduler's shift; None keeps the pipeline's.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 1024
    height: int = 1024
    seed: int = 0
    steps: int = 30
    guidance_scale: float = 4.0
    flow_shift: float | None = None


def draw(pipe: AnimaPipeline, request: Request) -> Image.Image:
    """Draw one picture with the adapters that are active in `pipe`."""
    shift = pipe.scheduler.shift
    pipe.scheduler.set_shift(shift if request.flow_shift is None else request.flow_shift)
    picture = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        return_dict=False,
    )[0][0]
    pipe.scheduler.set_shift(shift)
    return picture


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Pictures in rows and columns, each row with its label above it and each column with its label at the top.

    Args:
        rows: pictures; rows may differ in size but have equally many.
        row_labels: one a row; shortened to what fits.
        column_labels: one a column.
    """
    font = _font(14)
    line = round(font.getbbox("Ag国")[3]) + 4
    cell = max(picture.width for row in rows for picture in row)
    cell = max(cell, _MIN_CELL)
    width = _MARGIN + len(column_labels) * (cell + _MARGIN)
    heights = [_LABEL_LINES * line + max(picture.height for picture in row) + _MARGIN for row in rows]
    grid = Image.new("RGB", (width, line + _MARGIN + sum(heights)), "white")
    canvas = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        canvas.text((_MARGIN + column * (cell + _MARGIN), 2), _fit(label, font, cell), fill="black", font=font)
    top = line + _MARGIN
    for row, label, height in zip(rows, row_labels, heights, strict=True):
        canvas.text((_MARGIN, top), _fit(label, font, width - 2 * _MARGIN, lines=_LABEL_LINES), fill="black", font=font)
        for column, picture in enumerate(row):
            grid.paste(picture, (_MARGIN + column * (cell + _MARGIN), top + _LABEL_LINES * line))
        top += height
    return grid


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all, in the format its suffix names."""
    write_atomically(path, picture.save)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, lines: int = 1) -> str:
    """`text` in at most `lines` lines of `width` pixels, shortened with an ellipsis."""
    text = " ".join(text.split())
    fitted: list[str] = []
    for number in range(lines):
        last = number == lines - 1
        end = len(text)
        while end > 1 and font.getlength(text[:end] + ("…" if last and end < len(text) else "")) > width:
            end -= 1
        if not last and end < len(text):
            end = text.rfind(" ", 0, end) + 1 or end  # between words, where there are any
        fitted.append(text[:end] + ("…" if last and end < len(text) else ""))
        text = text[end:]
        if not text:
            break
    return "\n".join(fitted)

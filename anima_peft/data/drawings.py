"""Pictures about a dataset: a sheet of what is cropped from each picture, and tables to look at or to show."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .pictures import Picture, decode
from .summary import cropped_share

_CELL, _LABEL, _GAP = 168, 34, 8
_MOST_COLUMNS = 6
_PAPER, _INK, _FADED = (255, 255, 255), (20, 20, 20), (235, 238, 242)
_FRAME = (220, 40, 40)
_FONT_SIZE = 13


def contact_sheet(pictures: Sequence[Picture]) -> Image.Image:
    """Every picture whole and small, in numbered cells, with a frame around what is trained; what is cut off is pale.

    Raises:
        InputError: a picture cannot be read any more.
    """
    font = _font()
    columns = min(_MOST_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _LABEL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        left = _GAP + number % columns * (_CELL + _GAP)
        top = _GAP + number // columns * (_CELL + _LABEL + _GAP)
        sheet.paste(_cell(picture), (left, top))
        placement = picture.placement
        size = "x".join(map(str, picture.size)) + " > " + "x".join(map(str, placement.bucket))
        cut = f"cropped {cropped_share(placement):.0%}"
        draw.text((left, top + _CELL + 2), f"{number + 1}: {size}\n{cut}", fill=_INK, font=font, spacing=2)
    return sheet


def _cell(picture: Picture) -> Image.Image:
    image = decode(picture)
    scale = _CELL / max(image.size)
    small = image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.BOX)  # type: ignore[arg-type]
    placement = picture.placement
    across, down = (shown / whole for shown, whole in zip(small.size, placement.resized, strict=True))
    left, top = placement.crop
    box = (
        round(left * across),
        round(top * down),
        round((left + placement.bucket[0]) * across),
        round((top + placement.bucket[1]) * down),
    )
    faded = Image.blend(small, Image.new("RGB", small.size, _PAPER), 0.65)
    faded.paste(small.crop(box), box[:2])
    ImageDraw.Draw(faded).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_FRAME, width=2)
    cell = Image.new("RGB", (_CELL, _CELL), _FADED)
    cell.paste(faded, ((_CELL - small.width) // 2, (_CELL - small.height) // 2))
    return cell


def draw_table(rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> Image.Image:
    """Right-aligned columns under a heading, and lines of text below; for texts in the Latin alphabet."""
    font = _font()
    line, gap = _FONT_SIZE + 8, 22
    widths = [max(font.getlength(row[column]) for row in rows) for column in range(len(rows[0]))]
    table_width = int(sum(widths)) + gap * (len(widths) - 1)
    width = max(table_width, *(int(font.getlength(note)) for note in notes), 0) + 2 * gap
    picture = Image.new("RGB", (width, line * (len(rows) + len(notes) + 2)), _PAPER)
    draw = ImageDraw.Draw(picture)
    for number, row in enumerate(rows):
        if number % 2:
            draw.rectangle((0, line * number + line // 2, width, line * (number + 1) + line // 2), fill=_FADED)
        right = float(gap)
        for cell, column in zip(row, widths, strict=True):
            right += column
            draw.text((right, line * number + line // 2 + 3), cell, fill=_INK, font=font, anchor="ra")
            right += gap
    rule = line + line // 2
    draw.line((gap, rule, gap + table_width, rule), fill=_INK)
    for number, note in enumerate(notes):
        draw.text((gap, line * (len(rows) + number + 1)), note, fill=_INK, font=font)
    return picture


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)

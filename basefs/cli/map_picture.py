"""The map of an image as a picture: one layout, written as SVG or PNG."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from basefs.cli.cells import human_bytes
from basefs.cli.map_cells import KINDS, Cell, cells_of, coarser, offset_text, printable, share_text
from basefs.errors import ControlError

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

CELLS_MAX = 4096
MAP_WIDTH = 768
LEFT, TOP, RIGHT = 110, 92, 32
LINE = 24

Colour = tuple[int, int, int]
INK: Colour = (33, 37, 41)
FAINT: Colour = (95, 102, 110)
PAPER: Colour = (255, 255, 255)
FRAME: Colour = (190, 196, 202)
# here, zeros, being fetched, missing: in the order of KINDS; apart from each other also for who sees no red or green
COLOURS: tuple[Colour, ...] = ((8, 81, 156), (134, 203, 186), (230, 120, 0), (238, 240, 242))


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A filled rectangle, in pixels."""

    x: int
    y: int
    width: int
    height: int
    fill: Colour


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of text on the baseline `y`; `is_end`: it ends at `x`, else it begins there."""

    x: int
    y: int
    text: str
    size: int = 14
    ink: Colour = INK
    is_end: bool = False


@dataclass(slots=True, kw_only=True)
class Picture:
    """What is drawn, in order, on `PAPER`."""

    width: int
    height: int
    parts: list[Box | Line] = field(default_factory=list)


def picture_of(answer: dict[str, Any]) -> Picture:
    """The layout: title, the map with its offsets, the legend with bytes and shares."""
    size = answer["size"]
    cells = coarser(cells_of(answer), CELLS_MAX)
    columns = _columns(len(cells))
    side = MAP_WIDTH // columns
    rows = max(1, -(-len(cells) // columns))
    picture = Picture(width=LEFT + MAP_WIDTH + RIGHT, height=TOP + rows * side + 6 * LINE + 24)
    what = f"{answer['image_id']}   {human_bytes(size)} stored, {answer['state']}"
    name = printable(answer["name"])
    picture.parts += [
        Line(x=LEFT, y=34, text=name if len(name) <= 72 else f"{name[:69]}...", size=20),
        Line(x=LEFT, y=58, text=what, ink=FAINT),
    ]
    if answer["note"]:
        note = printable(answer["note"])
        picture.parts.append(Line(x=LEFT, y=80, text=note if len(note) <= 110 else f"{note[:107]}...", ink=FAINT))
    every = max(1, 48 // side)
    for row in range(rows):
        y = TOP + row * side
        if row % every == 0:
            offset = row * columns * cells[0].length if cells else 0
            text = offset_text(offset, size)
            picture.parts.append(Line(x=LEFT - 10, y=y + min(side, 14) - 1, text=text, ink=FAINT, is_end=True))
        for column, cell in enumerate(cells[row * columns : (row + 1) * columns]):
            box = Box(x=LEFT + column * side, y=y, width=side - 1, height=side - 1, fill=_colour(cell))
            picture.parts.append(box)
    _add_legend(picture, answer, cells, TOP + rows * side + LINE)
    return picture


def _columns(cells: int) -> int:
    """A power of two from 8 to 64, so that squares are whole pixels and the offsets at the rows round numbers."""
    columns = 8
    while columns < 64 and columns * columns < 2 * cells:
        columns *= 2
    return columns


def _colour(cell: Cell) -> Colour:
    """The colours of what it holds, mixed by bytes; what is here or under way is seen, however little it is."""
    parts = (cell.present, cell.zero, cell.fetching, cell.missing)
    weights = [part / cell.length for part in parts[:3]]
    weights = [max(weight, 0.2) if weight else 0.0 for weight in weights]
    most = sum(weights)
    if most > 1 or not cell.missing:
        weights = [weight / most for weight in weights]
    weights.append(max(0.0, 1 - sum(weights)))
    red, green, blue = (
        round(sum(weight * colour[at] for weight, colour in zip(weights, COLOURS, strict=True))) for at in range(3)
    )
    return red, green, blue


def _add_legend(picture: Picture, answer: dict[str, Any], cells: list[Cell], top: int) -> None:
    for at, (kind, colour) in enumerate(zip(KINDS, COLOURS, strict=True)):
        y = top + at * LINE
        part = answer[kind.key]
        picture.parts += [
            Box(x=LEFT, y=y, width=16, height=16, fill=FRAME),
            Box(x=LEFT + 1, y=y + 1, width=14, height=14, fill=colour),
            Line(x=LEFT + 26, y=y + 13, text=kind.label),
            Line(x=LEFT + 260, y=y + 13, text=human_bytes(part), is_end=True),
            Line(x=LEFT + 340, y=y + 13, text=share_text(part, answer["size"]), is_end=True),
        ]
    taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(answer["taken_at"]))
    square = f"one square: {human_bytes(cells[0].length)}, in the mixed colour of what it holds; " if cells else ""
    text = f"{square}{taken}"
    picture.parts.append(Line(x=LEFT, y=top + len(KINDS) * LINE + 16, text=text, size=13, ink=FAINT))


def svg_text(picture: Picture) -> str:
    """The picture as an SVG document."""
    width, height = picture.width, picture.height
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">',
        f'<rect width="100%" height="100%" fill="{_hex(PAPER)}"/>',
    ]
    for part in picture.parts:
        if isinstance(part, Box):
            place = f'x="{part.x}" y="{part.y}" width="{part.width}" height="{part.height}"'
            lines.append(f'<rect {place} fill="{_hex(part.fill)}"/>')
        else:
            anchor = ' text-anchor="end"' if part.is_end else ""
            place = f'x="{part.x}" y="{part.y}" font-size="{part.size}" fill="{_hex(part.ink)}"{anchor}'
            lines.append(f"<text {place}>{escape(part.text)}</text>")
    return "\n".join([*lines, "</svg>", ""])


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def write_svg(picture: Picture, path: Path) -> None:
    """Write the picture; ControlError if the file cannot be written."""
    try:
        path.write_text(svg_text(picture), encoding="utf-8")
    except OSError as exc:
        raise ControlError(f"cannot write {path}: {exc.strerror}") from None


def write_png(picture: Picture, path: Path) -> None:
    """Write the picture; ControlError if the file cannot be written."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (picture.width, picture.height), PAPER)
    draw = ImageDraw.Draw(image)
    for part in picture.parts:
        if isinstance(part, Box):
            # Pillow's second corner is part of the rectangle.
            draw.rectangle((part.x, part.y, part.x + part.width - 1, part.y + part.height - 1), fill=part.fill)
        else:
            _draw_text(draw, part)
    try:
        image.save(path, format="PNG", optimize=True)
    except OSError as exc:
        raise ControlError(f"cannot write {path}: {exc.strerror}") from None


def _draw_text(draw: "ImageDraw", line: Line) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(line.size)
    draw.text((line.x, line.y), line.text, fill=line.ink, font=font, anchor="rs" if line.is_end else "ls")

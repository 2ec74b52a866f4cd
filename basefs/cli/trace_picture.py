"""A boot trace as a picture: where in the image a boot reads, over time, and how much of it that is."""

from typing import Any

from basefs.cli.cells import human_bytes
from basefs.cli.map_cells import offset_text, printable
from basefs.cli.map_picture import COLOURS, FAINT, FRAME, Box, Line, Picture

WIDTH, HEIGHT = 768, 432
LEFT, TOP, RIGHT = 110, 92, 32
LINE = 24
MARKS = 5
POINT = 3
SHARE_HEIGHT = 16


def picture_of(answer: dict[str, Any]) -> Picture:
    """The layout of what `ServiceView.trace` tells: title, offset over time, and the bar of the share that is read."""
    trace = answer["trace"]
    size, seconds = answer["size"], max(answer["seconds"], 0.001)
    picture = Picture(width=LEFT + WIDTH + RIGHT, height=TOP + HEIGHT + 6 * LINE)
    name = printable(answer["name"])
    boots = "1 boot" if answer["boots"] == 1 else f"{answer['boots']} boots"
    picture.parts += [
        Line(x=LEFT, y=34, text=name if len(name) <= 72 else f"{name[:69]}...", size=20),
        Line(x=LEFT, y=58, text=f"{answer['image_id']}   what {boots} read, over time", ink=FAINT),
        Box(x=LEFT - 1, y=TOP - 1, width=WIDTH + 2, height=HEIGHT + 2, fill=FRAME),
        Box(x=LEFT, y=TOP, width=WIDTH, height=HEIGHT, fill=COLOURS[3]),
    ]
    for mark in range(MARKS):
        y, x = TOP + HEIGHT * mark // (MARKS - 1), LEFT + WIDTH * mark // (MARKS - 1)
        offset = offset_text(size * mark // (MARKS - 1), size)
        picture.parts.append(Line(x=LEFT - 10, y=y + 5, text=offset, ink=FAINT, is_end=True))
        text = f"{seconds * mark / (MARKS - 1):.1f} s"
        picture.parts.append(Line(x=x + 18, y=TOP + HEIGHT + 22, text=text, ink=FAINT, is_end=True))
    unit = trace["unit_bytes"]
    for first, count, at_ms, _unread in trace["ranges"]:
        y = TOP + min(HEIGHT - POINT, first * unit * HEIGHT // size)
        height = max(POINT, min(TOP + HEIGHT - y, count * unit * HEIGHT // size))
        x = LEFT + min(WIDTH - POINT, round(at_ms / 1000 / seconds * (WIDTH - POINT)))
        picture.parts.append(Box(x=x, y=y, width=POINT, height=height, fill=COLOURS[0]))
    _add_share(picture, answer, TOP + HEIGHT + 2 * LINE)
    return picture


def _add_share(picture: Picture, answer: dict[str, Any], top: int) -> None:
    read = max(1, round(WIDTH * answer["traced_bytes"] / answer["size"]))
    picture.parts += [
        Box(x=LEFT - 1, y=top - 1, width=WIDTH + 2, height=SHARE_HEIGHT + 2, fill=FRAME),
        Box(x=LEFT, y=top, width=WIDTH, height=SHARE_HEIGHT, fill=COLOURS[3]),
        Box(x=LEFT, y=top, width=min(WIDTH, read), height=SHARE_HEIGHT, fill=COLOURS[0]),
        Line(
            x=LEFT,
            y=top + SHARE_HEIGHT + LINE,
            text=f"{human_bytes(answer['traced_bytes'])} of {human_bytes(answer['size'])} are read: "
            f"{answer['traced_percent']:.1f} %, in {answer['ranges']} ranges",
        ),
    ]

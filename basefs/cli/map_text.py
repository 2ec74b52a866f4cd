"""The map of an image in a terminal, a pipe or a log: letters that say all of it, colours where there are some."""

from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from basefs.cli.cells import human_bytes
from basefs.cli.map_cells import KINDS, Cell, cells_of, coarser, offset_text, printable, share_text

ROWS_MAX = 16
COLUMNS_MIN = 8

# all of it, at least half, some; zeros; being fetched; missing
_GLYPHS = "█▓▒-~·"
_ASCII_GLYPHS = "#+:-~."
_COLOURS = ("blue", "blue", "blue", "cyan", "yellow", "bright_black")
_MEANINGS = ("here", "half or more", "less", "zeros", "being fetched", "missing")


def print_map(answer: dict[str, Any], stdout: TextIO) -> None:
    """Draw the map as wide as the terminal is; 80 columns and no colour where `stdout` is none."""
    console = Console(file=stdout, highlight=False, markup=False, emoji=False)
    glyphs = _glyphs(stdout)
    size = answer["size"]
    console.print(Text(printable(answer["name"]), style="bold"), soft_wrap=True)
    console.print(Text(f"{answer['image_id']}  {human_bytes(size)} stored, {answer['state']}"), soft_wrap=True)
    if answer["note"]:
        console.print(Text(printable(answer["note"])), soft_wrap=True)
    labels = len(offset_text(size, size)) + 2
    columns = max(COLUMNS_MIN, console.width - labels - 1)
    cells = coarser(cells_of(answer), columns * ROWS_MAX)
    for start in range(0, len(cells), columns):
        row = Text(f"{offset_text(start * cells[0].length, size):>{labels - 2}}  ")
        for cell in cells[start : start + columns]:
            look = _look(cell)
            row.append(glyphs[look], _COLOURS[look])
        console.print(row, soft_wrap=True)
    for line in _legend(answer, cells, glyphs):
        console.print(line, soft_wrap=True)


def _glyphs(stdout: TextIO) -> str:
    try:
        _GLYPHS.encode(getattr(stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return _ASCII_GLYPHS
    return _GLYPHS


def _look(cell: Cell) -> int:
    """Which glyph stands for the cell. What is under way or here is seen, however little it is."""
    here = cell.present + cell.zero
    if cell.fetching:
        return 4
    if not cell.present:
        return 3 if 2 * cell.zero >= cell.length else 5
    return 0 if here == cell.length else 1 if 2 * here >= cell.length else 2


def _legend(answer: dict[str, Any], cells: list[Cell], glyphs: str) -> list[Text]:
    size = answer["size"]
    legend = Text()
    for look, meaning in enumerate(_MEANINGS):
        legend.append(glyphs[look], _COLOURS[look])
        legend.append(f" {meaning}   ")
    legend.rstrip()
    lines = [Text(), legend]
    if cells:
        lines.append(Text(f"one letter: {human_bytes(cells[0].length)}"))
    lines += [
        Text(f"{kind.label:14} {human_bytes(answer[kind.key]):>10}  {share_text(answer[kind.key], size):>7}")
        for kind in KINDS
    ]
    return lines

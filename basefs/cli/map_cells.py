"""A map of an image as the server told it (`ServiceView.image_map`), for those who draw it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30
MIB = 1 << 20
TEXT_MAX = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """`length` bytes of the image, length > 0, by where they are; the rest is missing."""

    length: int
    present: int
    zero: int
    fetching: int

    @property
    def missing(self) -> int:
        """Bytes that are not here and not on their way."""
        return self.length - self.present - self.zero - self.fetching


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One of the four places where bytes may be; `key` is its name in the answer."""

    key: str
    label: str


KINDS = (
    Kind(key="present_bytes", label="here"),
    Kind(key="zero_bytes", label="here, zeros"),
    Kind(key="fetching_bytes", label="being fetched"),
    Kind(key="missing_bytes", label="missing"),
)


def cells_of(answer: dict[str, Any]) -> list[Cell]:
    """The cells, from byte 0 on."""
    cells: list[Cell] = []
    left = answer["size"]
    for run in answer["runs"]:
        for _ in range(run["cells"]):
            length = min(answer["cell_bytes"], left)
            left -= length
            cells.append(
                Cell(
                    length=length,
                    present=run["present_bytes"],
                    zero=run["zero_bytes"],
                    fetching=run["fetching_bytes"],
                )
            )
    return cells


def coarser(cells: Sequence[Cell], cells_max: int) -> list[Cell]:
    """The same bytes in at most `cells_max` >= 1 cells, each of as many cells of before but the last."""
    step = max(1, -(-len(cells) // cells_max))
    if step == 1:
        return list(cells)
    groups = [cells[start : start + step] for start in range(0, len(cells), step)]
    return [
        Cell(
            length=sum(cell.length for cell in group),
            present=sum(cell.present for cell in group),
            zero=sum(cell.zero for cell in group),
            fetching=sum(cell.fetching for cell in group),
        )
        for group in groups
    ]


def offset_text(offset: int, size: int) -> str:
    """A place on the axis: in GiB, in MiB for an image of less than 1 GiB."""
    if size < GIB:
        return f"{offset / MIB:.1f} MiB"
    return f"{offset / GIB:.2f} GiB" if size < 100 * GIB else f"{offset / GIB:.0f} GiB"


def share_text(part: int, size: int) -> str:
    """`12.3 %`; neither 0 nor 100 for what is not quite that."""
    if part in (0, size):
        return "100 %" if part else "0 %"
    return f"{min(99.9, max(0.1, 100 * part / size)):.1f} %"


def printable(text: str) -> str:
    """Another's text in one line that does nothing to a terminal: image names are their owners' choice."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= TEXT_MAX else shown[: TEXT_MAX - 3] + "..."

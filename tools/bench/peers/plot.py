"""The results as one SVG: a panel for each work and link, a bar for each peer. Made of the JSON only."""

from dataclasses import dataclass
from html import escape

from tools.bench.peers import work_cached
from tools.bench.peers.record import Results, exceeds
from tools.bench.peers.table import shown_value

COLUMNS = 4
PANEL_WIDTH, GAP = 250, 16
TITLE_HEIGHT, BAR_HEIGHT, BAR_STEP = 40, 12, 17
NAME_WIDTH, VALUE_WIDTH = 84, 62
HEAD_HEIGHT = 58
INK, QUIET, PAPER = "#1f2933", "#616e7c", "#ffffff"
COLORS = {"basefs": "#1d4ed8", "basefs trace": "#172f7a", "basefs qcow2": "#7ea2f0", "local file": "#3e4c59"}
OTHER = "#b8c1cc"
OURS = ("basefs", "basefs trace")
LEFT_OUT = ("trace, warm", work_cached.WHOLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A peer's median; `share` of the panel's longest."""

    name: str
    share: float
    shown: str


def svg(results: Results) -> str:
    """The whole picture."""
    rows = [row for row in results.rows() if row[0] not in LEFT_OUT]
    panels = [(work, link, _bars(results, work, link)) for work, link in rows]
    lines, top = [], float(HEAD_HEIGHT)
    for first in range(0, len(panels), COLUMNS):
        row = panels[first : first + COLUMNS]
        for column, (work, link, bars) in enumerate(row):
            unit = results.of(work, link, bars[0].name)[0].unit
            lines += _panel(GAP + column * (PANEL_WIDTH + GAP), top, work, f"{link}, {_meaning(unit)}", bars)
        top += TITLE_HEIGHT + max(len(bars) for _, _, bars in row) * BAR_STEP + GAP
    width, height = GAP + COLUMNS * (PANEL_WIDTH + GAP), top + GAP
    box = f'viewBox="0 0 {width} {height:.0f}" font-family="sans-serif" font-size="11"'
    how_often = f"medians of {results.alternations} alternations, fewer of what takes long"
    made = f"{results.machine}, Linux {results.kernel}, {results.made_at[:10]}; {how_often}"
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{width}" height="{height:.0f}" fill="{PAPER}"/>',
        _text(GAP, 24, "basefs beside what else brings an image to a node", size=16, weight="bold"),
        _text(GAP, 42, made, color=QUIET),
    ]
    return "\n".join([*head, *lines, "</svg>"]) + "\n"


def _meaning(unit: str) -> str:
    return "seconds: shorter is better" if unit == "s" else f"{unit}: longer is better"


def _bars(results: Results, work: str, link: str) -> list[Bar]:
    medians = {peer: results.median(work, link, peer) for peer in results.peers()}
    found = {peer: value for peer, value in medians.items() if value is not None}
    longest = max(found.values()) or 1.0
    bars = []
    for peer, value in found.items():
        runs = results.of(work, link, peer)
        shown = f"> {value:,.0f}" if exceeds(runs) else shown_value(runs[0], value)
        bars.append(Bar(name=peer, share=value / longest, shown=shown))
    return bars


def _panel(left: float, top: float, title: str, subtitle: str, bars: list[Bar]) -> list[str]:
    room = PANEL_WIDTH - NAME_WIDTH - VALUE_WIDTH
    lines = [
        _text(left, top + 12, title, size=12, weight="bold"),
        _text(left, top + 27, subtitle, color=QUIET, size=10),
    ]
    for number, bar in enumerate(bars):
        y = top + TITLE_HEIGHT + number * BAR_STEP
        length = max(1.0, bar.share * room)
        weight = "bold" if bar.name in OURS else "normal"
        where = f'x="{left + NAME_WIDTH:.0f}" y="{y:.0f}" width="{length:.1f}" height="{BAR_HEIGHT}" rx="2"'
        lines += [
            _text(left + NAME_WIDTH - 6, y + 10, bar.name, anchor="end", weight=weight),
            f'<rect {where} fill="{COLORS.get(bar.name, OTHER)}"/>',
            _text(left + NAME_WIDTH + length + 5, y + 10, bar.shown, weight=weight),
        ]
    return lines


def _text(
    x: float, y: float, text: str, *, size: int = 11, color: str = INK, weight: str = "normal", anchor: str = "start"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{color}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{escape(text)}</text>'

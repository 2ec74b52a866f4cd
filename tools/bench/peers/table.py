"""All results as one text table: a block for each work and link, a column for each peer."""

from collections.abc import Callable, Sequence

from tools.bench.peers.record import Results, Run, exceeds, median_of

REFERENCE = "basefs"
LABEL_WIDTH = 34
COLUMN_WIDTH = 15
MB = 1e6
MIB = 1 << 20


def text(results: Results) -> str:
    """The table, with machine and versions above it."""
    peers = [*results.peers(), *sorted({run.peer for run in results.runs} - set(results.versions))]
    how = f"{results.made_at}, {results.seconds:.0f} s, {results.alternations} alternations"
    lines = [
        f"{results.machine}, Linux {results.kernel}; {how}",
        results.source,
        *(f"{name}: {version}" for name, version in results.versions.items()),
        "",
        "medians; in brackets how often the peer's value is as much as basefs', the median of the alternations' ratios",
        "",
        _line("", peers),
    ]
    for work, link in results.rows():
        lines += ["", *_block(results, work, link, peers)]
    return "\n".join(lines)


def _block(results: Results, work: str, link: str, peers: Sequence[str]) -> list[str]:
    cells = [results.of(work, link, peer) for peer in peers]
    runs = max(len(cell) for cell in cells)
    unit = next(cell[0].unit for cell in cells if cell)
    values = [_value(results, work, link, peer) for peer in peers]
    lines = [f"{work} ({link}; {runs} run{'s' * (runs > 1)})", _line(f"  {unit}", values)]
    told: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("fetched_bytes", "  MB fetched", lambda value: f"{value / MB:,.1f}"),
        ("requests", "  requests", lambda value: f"{value:,.0f}"),
        ("cpu_s", "  CPU s", lambda value: f"{value:.2f}"),
        ("memory_bytes", "  memory MiB", lambda value: f"{value / MIB:,.0f}"),
    )
    for name, label, shown in told:
        medians = [median_of(cell, name) for cell in cells]
        if any(medians):
            lines.append(_line(label, ["-" if value is None else shown(value) for value in medians]))
    return lines


def _value(results: Results, work: str, link: str, peer: str) -> str:
    runs = results.of(work, link, peer)
    median = results.median(work, link, peer)
    if median is None:
        return "-"
    if exceeds(runs):
        return f"> {median:,.0f}"
    ratio = results.ratio(work, link, peer, REFERENCE)
    return shown_value(runs[0], median) + ("" if peer == REFERENCE or ratio is None else f" ({ratio:.2f})")


def shown_value(run: Run, value: float) -> str:
    """A value with as many digits as it deserves, without its unit."""
    return f"{value:,.0f}" if run.unit == "IOPS" or value >= 100 else f"{value:.2f}"


def _line(label: str, cells: Sequence[str]) -> str:
    return (label.ljust(LABEL_WIDTH) + "".join(cell.rjust(COLUMN_WIDTH) for cell in cells)).rstrip()

"""What `make bench-peers` makes of its records: JSON, medians and ratios, table, bounds and plot."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tools.bench.peers import bounds, plot, table, work_cached, work_guest
from tools.bench.peers.record import Results, Run, load, save
from tools.bench.report import Report

COLD = (work_guest.COLD, "1 Gbit/s, 10 ms")
RANDOM = (work_cached.name("4 KiB random, queue depth 1"), "loopback")
SEQUENTIAL = (work_cached.name("1 MiB sequential"), "loopback")


def run(cell: tuple[str, str], peer: str, alternation: int, value: float, unit: str = "s", **more: object) -> Run:
    known = {"work": cell[0], "link": cell[1], "peer": peer, "alternation": alternation, "value": value, "unit": unit}
    return Run(**known, **more)


def results(*runs: Run) -> Results:
    peers = ("basefs", "local file", "nova", "rclone", "nbdkit")
    return Results(
        made_at="2026-11-27T18:00:00+00:00",
        machine="2 cores (some)",
        kernel="6.18",
        alternations=3,
        seconds=60,
        source="one range: 1 ms",
        distinct_bytes=1 << 20,
        versions={**{peer: f"{peer} 1.0 <&>" for peer in peers}, "qemu": "7.2"},
        runs=list(runs),
    )


@pytest.fixture
def some() -> Results:
    ours = [
        run(COLD, "basefs", n, value, fetched_bytes=50_000_000, requests=9, cpu_s=0.5)
        for n, value in enumerate((4.0, 2.0, 3.0))
    ]
    limit = [run(COLD, "local file", n, value) for n, value in enumerate((2.0, 2.0, 2.0))]
    late = [run(COLD, "nova", 0, 60.0, exceeded=True, memory_bytes=300 << 20)]
    iops = [
        run(RANDOM, "basefs", 0, 30_000, "IOPS"),
        run(RANDOM, "rclone", 0, 10_000, "IOPS"),
        run(RANDOM, "nbdkit", 0, 40_000, "IOPS"),
    ]
    rates = [
        run(SEQUENTIAL, "basefs", 0, 5.0, "GB/s"),
        run(SEQUENTIAL, "rclone", 0, 1.0, "GB/s"),
        run(SEQUENTIAL, "nbdkit", 0, 2.0, "GB/s"),
    ]
    return results(*ours, *limit, *late, *iops, *rates)


def test_what_was_kept_is_read_again(some: Results, tmp_path: Path) -> None:
    save(some, tmp_path / "kept" / "peers.json")
    assert load(tmp_path / "kept" / "peers.json") == some


def test_json_has_one_run_a_line(some: Results, tmp_path: Path) -> None:
    save(some, tmp_path / "peers.json")
    lines = (tmp_path / "peers.json").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith('{"work": ') for line in lines) == len(some.runs)


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "peers.json").write_text('{"version": 99}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"peers\.json has version 99"):
        load(tmp_path / "peers.json")


def test_a_ratio_is_the_median_of_the_alternations_not_of_the_medians() -> None:
    pairs = [(4.0, 1.0), (2.0, 2.0), (9.0, 3.0)]
    runs = [run(COLD, peer, n, pair[k]) for n, pair in enumerate(pairs) for k, peer in enumerate(("basefs", "nova"))]
    assert results(*runs).median(*COLD, "basefs") == 4.0
    assert results(*runs).ratio(*COLD, "basefs", "nova") == 3.0


def test_a_ratio_needs_an_alternation_that_both_have() -> None:
    assert results(run(COLD, "basefs", 0, 1.0), run(COLD, "nova", 1, 1.0)).ratio(*COLD, "basefs", "nova") is None


def test_the_table_says_values_ratios_limits_and_what_was_used(some: Results) -> None:
    lines = table.text(some).splitlines()
    block = lines[lines.index("guest, cold (1 Gbit/s, 10 ms; 3 runs)") :]
    assert block[1].split() == ["s", "3.00", "2.00", "(0.67)", ">", "60", "-", "-"]
    assert block[2].split() == ["MB", "fetched", "50.0", "-", "-", "-", "-"]
    assert block[3].split() == ["requests", "9", "-", "-", "-", "-"]
    assert block[4].split() == ["CPU", "s", "0.50", "-", "-", "-", "-"]
    assert block[5].split() == ["memory", "MiB", "-", "-", "300", "-", "-"]
    assert "nova: nova 1.0 <&>" in lines


def test_bounds_are_judged_by_the_ratios(some: Results) -> None:
    report = Report()
    bounds.judge(report, some)
    verdicts = {figure.name.strip(): (figure.value, figure.met) for figure in report.figures}
    assert verdicts == {
        "cold guest, no trace, 1 Gbit/s + 10 ms: seconds / local file's": ("1.50", True),
        "seconds / those of nova": ("0.07", True),
        "4 KiB random, queue depth 1, cached: IOPS / those of rclone": ("3", True),
        "4 KiB random, queue depth 1, cached: IOPS / those of nbdkit": ("0.75", False),
        "1 MiB sequential, cached: bytes / those of the best peer (nbdkit)": ("2.50", True),
    }


def test_nothing_measured_is_nothing_judged() -> None:
    report = Report()
    bounds.judge(report, results())
    assert report.figures == []


def test_the_plot_is_well_formed_with_a_bar_for_each_peer_of_a_panel(some: Results) -> None:
    picture = ElementTree.fromstring(plot.svg(some))
    name = "{http://www.w3.org/2000/svg}"
    bars = list(picture.iter(f"{name}rect"))[1:]
    assert len(bars) == 3 + 3 + 3
    shown = [one.text for one in picture.iter(f"{name}text")]
    assert {"guest, cold", "> 60", "30,000", "1 MiB sequential, cached"} <= set(shown)
    longest = max(float(bar.attrib["width"]) for bar in bars)
    assert all(0 < float(bar.attrib["width"]) <= longest for bar in bars)


def test_kept_results_are_those_of_the_plot_beside_them() -> None:
    kept = Path(__file__).parents[2] / "docs/bench/peers.json"
    if kept.exists():
        assert kept.with_suffix(".svg").read_text(encoding="utf-8") == plot.svg(load(kept))

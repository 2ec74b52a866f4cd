"""What `make bench-fleet` makes of its records: JSON, table, model."""

from dataclasses import replace
from pathlib import Path

import pytest

from tools.bench.fleet import model
from tools.bench.fleet.record import FleetResults, FleetRun, load, save, table

ONE = FleetRun(
    way="Glance + tier",
    nodes=1,
    first_s=4.0,
    last_s=4.0,
    glance_bytes=80_000_000,
    glance_requests=1000,
    asked=200,
    glance_cpu_s=8.0,
    other_bytes=70_000_000,
    other_requests=200,
    other_cpu_s=0.5,
    nodes_cpu_s=1.0,
    node_memory_bytes=150 << 20,
)
TWENTY = replace(
    ONE,
    nodes=20,
    first_s=30.0,
    last_s=31.0,
    glance_bytes=80_000_000,
    glance_requests=4800,
    asked=4000,
    glance_cpu_s=8.0 + 19 * 1.6,
    other_bytes=20 * 70_000_000,
    other_requests=4000,
    other_cpu_s=10.0,
    nodes_cpu_s=20.0,
)
SITE = model.Site(glance_processes=8, tier_processors=8, link_bits_s=10e9)


def results(*runs: FleetRun) -> FleetResults:
    return FleetResults(
        made_at="2026-11-27T18:00:00+00:00",
        machine="2 cores (some)",
        kernel="6.18",
        commit="abc",
        nginx="nginx/1.22.1",
        distinct_bytes=43_000_000,
        runs=list(runs),
    )


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    save(results(ONE, TWENTY), tmp_path / "kept" / "fleet.json")
    assert load(tmp_path / "kept" / "fleet.json") == results(ONE, TWENTY)
    (tmp_path / "other.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="version 99"):
        load(tmp_path / "other.json")


def test_the_table_tells_requests_for_bytes_apart_from_those_that_ask_for_leave() -> None:
    rows = table(results(ONE, TWENTY)).splitlines()
    assert "nginx/1.22.1" in rows[0]
    assert rows[2].split()[3:] == ["1", "4.00", "4.00", "80.0", "800", "200", "8.0", "70.0", "200", "0.5", "1.0", "150"]


def test_the_model_has_what_was_measured_and_goes_on_as_it_grew() -> None:
    for run in (ONE, TWENTY):
        same = model.expected(ONE, TWENTY, run.nodes, SITE)
        assert (same.glance_bytes, round(same.glance_requests)) == (run.glance_bytes, run.glance_requests)
    thousand = model.expected(ONE, TWENTY, 1000, SITE)
    assert thousand.glance_bytes == ONE.glance_bytes
    assert thousand.bound_by == "Glance's processes"
    assert thousand.last_s == pytest.approx((8.0 + 999 * 1.6) / 8)


def test_the_model_names_what_is_slowest() -> None:
    assert model.expected(ONE, TWENTY, 1, SITE).bound_by == "one node's own time"
    quick = replace(TWENTY, glance_cpu_s=8.0)  # Glance is asked for leave once
    assert model.expected(ONE, quick, 1000, SITE).bound_by in ("the other's link", "the other's processors")
    slow = model.Site(link_bits_s=1e9)
    assert model.expected(ONE, quick, 1000, slow).last_s == pytest.approx(1000 * 70e6 * 8 / 1e9)
    assert "1000 nodes: last after" in model.table(results(ONE, quick))

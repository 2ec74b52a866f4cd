"""What the cells of tables say."""

import pytest

from basefs.cli.cells import Cell, rows_of

MOMENT = 1795823624.5


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("cache_bytes", 2048, "2.0 KiB"),
        ("size", None, ""),
        ("cache_max_bytes", 0, "no limit"),
        ("catalog_refreshed_at", MOMENT, "2026-11-27 23:53:44Z"),
        ("glance_error_at", None, ""),
        ("glance_reachable", True, "True"),
        ("deaths", 3, "3"),
        ("first_byte_s", 0.0123456, "0.01235"),
        ("in_use", ["open", "pinned"], "open, pinned"),
        ("fuse_requests", {"read": 5, "lookup": 7}, "read: 5\nlookup: 7"),
        ("planner", {"bytes_s": None, "gap_bytes": 131072}, "bytes_s: \ngap_bytes: 128.0 KiB"),
        ("endpoints", {"glance": {"state": "away", "since": MOMENT, "error": None}},
         "glance: state away, since 2026-11-27 23:53:44Z"),
        ("stores", [{"source": "rbd", "endpoint": "ceph", "state": "resting", "error": "no answer"}],
         "rbd at ceph: resting: no answer"),
    ],
)  # fmt: skip
def test_a_cell_is_readable_in_a_table_and_raw_elsewhere(name: str, value: object, said: str) -> None:
    cell = Cell(name, value)
    assert cell.human_readable() == said
    assert cell.machine_readable() == value


def test_rows_sort_with_what_is_unknown_last() -> None:
    rows = rows_of(("size",), [{"size": 5}, {}, {"size": 3}])
    assert [row[0].machine_readable() for row in sorted(rows)] == [3, 5, None]

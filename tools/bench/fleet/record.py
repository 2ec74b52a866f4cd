"""What a run of `make bench-fleet` leaves: plain records, the JSON that they are kept as, and the table of them."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
MB = 1_000_000
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRun:
    """`nodes` that booted one image cold at once, by one way.

    `first_s` and `last_s` are the times of the first and the last one that was done. Bytes, requests and processor
    seconds of Glance; of them `asked` are requests of one byte, by which a tier asks whether somebody may have the
    image. `other_*` are those of the tier or store. `node_memory_bytes` is the most that a node's processes had.
    """

    way: str
    nodes: int
    first_s: float
    last_s: float
    glance_bytes: int
    glance_requests: int
    asked: int
    glance_cpu_s: float
    other_bytes: int
    other_requests: int
    other_cpu_s: float
    nodes_cpu_s: float
    node_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetResults:
    """All runs, and what they were made with; `distinct_bytes` are what the boot touches, in 64 KiB."""

    made_at: str
    machine: str
    kernel: str
    commit: str
    nginx: str
    distinct_bytes: int
    runs: list[FleetRun] = field(default_factory=list)

    def of(self, way: str, nodes: int) -> FleetRun | None:
        """The run of so many nodes by this way; None if it was not measured."""
        return next((one for one in self.runs if (one.way, one.nodes) == (way, nodes)), None)


def save(results: FleetResults, path: Path) -> None:
    """Write the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": VERSION, **asdict(results)}, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> FleetResults:
    """Read what `save` wrote; ValueError if it is of another version."""
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if (version := kept.pop("version", None)) != VERSION:
        raise ValueError(f"{path} has version {version} of the fleet's results, not {VERSION}")
    return FleetResults(**{**kept, "runs": [FleetRun(**run) for run in kept["runs"]]})


_COLUMNS = (
    ("way", lambda run: run.way),
    ("nodes", lambda run: f"{run.nodes}"),
    ("first s", lambda run: f"{run.first_s:.2f}"),
    ("last s", lambda run: f"{run.last_s:.2f}"),
    ("Glance MB", lambda run: f"{run.glance_bytes / MB:.1f}"),
    ("requests", lambda run: f"{run.glance_requests - run.asked}"),
    ("asked", lambda run: f"{run.asked}"),
    ("Glance CPU s", lambda run: f"{run.glance_cpu_s:.1f}"),
    ("other MB", lambda run: f"{run.other_bytes / MB:.1f}"),
    ("requests", lambda run: f"{run.other_requests}"),
    ("other CPU s", lambda run: f"{run.other_cpu_s:.1f}"),
    ("nodes CPU s", lambda run: f"{run.nodes_cpu_s:.1f}"),
    ("node MiB", lambda run: f"{run.node_memory_bytes / MIB:.0f}"),
)


def table(results: FleetResults) -> str:
    """All runs as text, with what they were made on above them."""
    rows = [[name for name, _ in _COLUMNS], *([shown(run) for _, shown in _COLUMNS] for run in results.runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    about = f"{results.machine}, Linux {results.kernel}, basefs {results.commit}, {results.nginx}; {results.made_at}"
    return "\n".join([about, *lines])

"""What a run of `make bench-peers` leaves: plain records, and the JSON that they are kept as."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One peer doing one work once.

    `value` is in `unit`: "s" (less is better), "IOPS" or "GB/s" (more is). `exceeded`: it took longer than `value`
    seconds and was given up. None: not measured, or nothing that this peer could tell.
    """

    work: str
    link: str
    peer: str
    alternation: int
    value: float
    unit: str
    exceeded: bool = False
    fetched_bytes: int | None = None
    requests: int | None = None
    cpu_s: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All runs, and what they were made with.

    `distinct_bytes` are what the replayed trace touches, in 64 KiB; `guest_distinct_bytes` what a real guest reads
    until it is up, as basefs recorded it; 0: no guest was booted.
    """

    made_at: str
    machine: str
    kernel: str
    alternations: int
    seconds: float
    source: str
    distinct_bytes: int
    versions: dict[str, str]
    guest_distinct_bytes: int = 0
    runs: list[Run] = field(default_factory=list)

    def of(self, work: str, link: str, peer: str) -> list[Run]:
        """The runs of one cell, by alternation."""
        found = [one for one in self.runs if (one.work, one.link, one.peer) == (work, link, peer)]
        return sorted(found, key=lambda one: one.alternation)

    def rows(self) -> list[tuple[str, str]]:
        """Each (work, link) once, in the order in which they were first measured."""
        return list(dict.fromkeys((one.work, one.link) for one in self.runs))

    def peers(self) -> list[str]:
        """Each peer once, in the order in which they are shown."""
        return [name for name in self.versions if any(one.peer == name for one in self.runs)]

    def median(self, work: str, link: str, peer: str) -> float | None:
        """The median value of a cell; None if it was never measured. One that was given up counts as its limit."""
        values = [one.value for one in self.of(work, link, peer)]
        return statistics.median(values) if values else None

    def ratio(self, work: str, link: str, peer: str, other: str) -> float | None:
        """The median of the alternations' ratios of two peers' values, how often `peer`'s is as much as `other`'s.

        None if no alternation has both.
        """
        others = {one.alternation: one.value for one in self.of(work, link, other)}
        pairs = [(one.value, others[one.alternation]) for one in self.of(work, link, peer) if one.alternation in others]
        return statistics.median(a / b for a, b in pairs) if pairs else None


def exceeds(runs: Iterable[Run]) -> bool:
    """Whether more than half of the runs were given up, so that their median says no more than "longer"."""
    given_up = [one.exceeded for one in runs]
    return sum(given_up) * 2 > len(given_up)


def median_of(runs: Sequence[Run], name: str) -> float | None:
    """The median of one of the optional figures over the runs that have it."""
    values = [value for one in runs if (value := getattr(one, name)) is not None]
    return statistics.median(values) if values else None


def save(results: Results, path: Path) -> None:
    """Write the JSON, one run a line, so that two of them can be compared by diff."""
    head: dict[str, Any] = asdict(results)
    runs = head.pop("runs")
    lines = [json.dumps({"version": VERSION, **head}, indent=1).removesuffix("\n}") + ',\n "runs": [']
    lines += [",\n".join(json.dumps({k: v for k, v in run.items() if v is not None}) for run in runs), "]}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(path: Path) -> Results:
    """Read what `save` wrote; ValueError if it is of another version."""
    with open(path, encoding="utf-8") as file:
        kept = json.load(file)
    if (version := kept.pop("version", None)) != VERSION:
        raise ValueError(f"{path} has version {version} of the benchmark's results, not {VERSION}")
    return Results(**{**kept, "runs": [Run(**run) for run in kept["runs"]]})

"""What the phases of a soak share: where to write, how long to take, what to report to, and figures of a mount."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.report import Report
from tools.mount import BasefsMount
from tools.soak.killer import keeper_pid, server_pid
from tools.soak.samples import Sampler, after_warm_up, growth, slope_mib_per_hour

FULL_MINUTES = 30.0
SERVER_GROWTH_MIB_PER_HOUR_MAX = 60.0
"""A fit over minutes, so 5 MiB within five of them: pages that an allocator keeps, not a leak a request."""
SLOPE_MINUTES_MIN = 2.5
KEEPER_GROWTH_MIB_PER_HOUR_MAX = 2.0
KEEPER_MIB_MAX = 15.0
FDS_GROWTH_MAX = 8
THREADS_GROWTH_MAX = 8


@dataclass(frozen=True, kw_only=True)
class Soak:
    """One run. `scale` is 1 for the full half hour."""

    report: Report
    scratch: Path
    scale: float

    def seconds(self, full_s: float, least_s: float) -> float:
        """How long something takes that takes `full_s` in a full run."""
        return max(least_s, full_s * self.scale)

    def directory(self, name: str) -> Path:
        """A directory of one phase."""
        path = self.scratch / name
        path.mkdir()
        return path

    def no_errors(self, name: str, errors: str | Iterable[str]) -> None:
        """Add the figure that must be 0; says what the errors were. A text is one error, unless it is empty."""
        found = [error for error in ([errors] if isinstance(errors, str) else errors) if error]
        for error in found[:5]:
            self.report.note(f"ERROR {name}: {error}")
        self.report.at_most(name, len(found), 0)


def status(mount: BasefsMount) -> dict[str, Any]:
    """What the mount says of itself, without starting a command."""
    value: dict[str, Any] = json.loads((mount.mountpoint / ".basefs" / "status.json").read_text(encoding="utf-8"))
    return value


def server_sampler(mount: BasefsMount) -> Sampler:
    """Samples whichever server runs."""
    return Sampler(lambda: server_pid(mount))


def keeper_sampler(mount: BasefsMount) -> Sampler:
    """Samples the keeper."""
    return Sampler(lambda: keeper_pid(mount))


def _report_slope(soak: Soak, name: str, minutes: float, slope: float, slope_max: float) -> None:
    """A fit over less than SLOPE_MINUTES_MIN says nothing; it is told, and held to no bound."""
    if minutes < SLOPE_MINUTES_MIN:
        soak.report.tell(name, f"{slope:.1f} MiB/h")
    else:
        soak.report.at_most(name, slope, slope_max, "MiB/h")


def report_steadiness(soak: Soak, who: str, sampler: Sampler, *, warm_up_s: float, slope_max: float) -> None:
    """Report memory, its slope, fds and threads of what a sampler saw."""
    steady = after_warm_up(sampler.samples, warm_up_s)
    if not steady:
        soak.report.at_least(f"{who}: samples", 0, 1)
        return
    report = soak.report
    highest_mib = max(one.rss_mib for one in steady)
    report.tell(f"{who}: memory, last and highest", f"{steady[-1].rss_mib:.1f} / {highest_mib:.1f} MiB")
    minutes = (steady[-1].at - steady[0].at) / 60
    _report_slope(soak, f"{who}: growth over {minutes:.1f} min", minutes, slope_mib_per_hour(steady), slope_max)
    report.at_most(f"{who}: growth of open fds", growth([one.fds for one in steady]), FDS_GROWTH_MAX)
    report.at_most(f"{who}: growth of threads", growth([one.threads for one in steady]), THREADS_GROWTH_MAX)


def pause(seconds: float) -> None:
    """Let time pass; Ctrl-C ends it."""
    threading.Event().wait(seconds)


def wait_for(mount: BasefsMount, fetched_bytes: int, limit_s: float = 180.0) -> None:
    """Return when the server has fetched that much; TimeoutError otherwise."""
    deadline = time.monotonic() + limit_s
    while status(mount)["fetched_bytes"] < fetched_bytes:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{fetched_bytes} bytes not fetched within {limit_s:g} s")
        pause(0.1)


def end_children(name: str) -> None:
    """Kill what this process has started and not waited for, as far as its program's name begins with `name`."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text(encoding="ascii").split():
            if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").startswith(name):
                os.kill(int(pid), signal.SIGKILL)

"""What the processes of a mount hold, once a second: memory, file descriptors, threads; and whether it grows."""

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

INTERVAL_S = 1.0
S_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at one process; `at` is `time.monotonic()`."""

    at: float
    pid: int
    rss_mib: float
    fds: int
    threads: int


def sample(pid: int) -> Sample | None:
    """Look at a process; None when it has gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            fields = dict(line.split(":", 1) for line in status)
        fds = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    if "VmRSS" not in fields:  # a zombie
        return None
    rss_mib = int(fields["VmRSS"].split()[0]) / 1024
    return Sample(at=time.monotonic(), pid=pid, rss_mib=rss_mib, fds=fds, threads=int(fields["Threads"]))


class Sampler:
    """Samples the process that `pid_of` names, which may change, from `start` to `stop`."""

    def __init__(self, pid_of: Callable[[], int | None]) -> None:
        self.samples: list[Sample] = []
        self._pid_of = pid_of
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            pid = self._pid_of()
            found = None if pid is None else sample(pid)
            if found is not None:
                self.samples.append(found)


def after_warm_up(samples: Sequence[Sample], warm_up_s: float) -> list[Sample]:
    """The samples of the last process among them, without its first `warm_up_s` seconds."""
    if not samples:
        return []
    mine = [one for one in samples if one.pid == samples[-1].pid]
    return [one for one in mine if one.at >= mine[0].at + warm_up_s]


def slope_mib_per_hour(samples: Sequence[Sample]) -> float:
    """What the memory grows by, by linear fit; 0 for fewer than two samples."""
    if len(samples) < 2:
        return 0.0
    fit = statistics.linear_regression([one.at for one in samples], [one.rss_mib for one in samples])
    return fit.slope * S_PER_HOUR


def growth(values: Sequence[int]) -> float:
    """Median of the last quarter less that of the first one: what is left when it goes up and down."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) - statistics.median(values[:quarter]) if values else 0.0

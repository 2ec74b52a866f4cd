"""Replayed guests: as many as wanted, in one process that basefs takes for qemu."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.mount import ROOT
from tools.soak.patterned import Trace

PROGRAM = "qemu-system-replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestsResult:
    """What all guests saw; times are those of `time.monotonic()`."""

    reads: int
    wrong: int
    errors: tuple[str, ...]
    stalls: tuple[tuple[tuple[float, float], ...], ...]
    """Of each guest, the reads that took longer than 50 ms: begin and end."""
    ended_at: tuple[float, ...]

    @property
    def longest_stall_s(self) -> float:
        """The longest read of all."""
        return max((end - begin for stalls in self.stalls for begin, end in stalls), default=0.0)

    def recovery_s(self, back_at: float) -> list[float]:
        """Of each guest that waited when Glance came back: how much longer it waited then, shortest first."""
        return sorted(end - back_at for stalls in self.stalls for begin, end in stalls if begin < back_at < end)

    def durations_s(self) -> list[float]:
        """Of each guest, all it waited in reads that took longer than 50 ms, shortest first."""
        return sorted(sum(end - begin for begin, end in stalls) for stalls in self.stalls)


class Guests:
    """`number_of[path]`: the guests' images by path, as often as there are guests on them."""

    def __init__(
        self, scratch: Path, images: Sequence[tuple[Path, int]], trace: Trace, *, spread_s: float, pace_s: float
    ) -> None:
        work = {
            "guests": [(str(path), number) for path, number in images],
            "trace": trace,
            "spread_s": spread_s,
            "pace_s": pace_s,
        }
        self._out = scratch / "guests.json"
        with open(self._out, "wb") as out:
            self._process = subprocess.Popen(
                [str(_program(scratch)), "-m", "tools.soak.replayer", json.dumps(work)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                cwd=ROOT,
                env={**os.environ, "PYTHONHOME": sys.base_prefix},
            )

    @property
    def is_running(self) -> bool:
        """Whether a guest still reads."""
        return self._process.poll() is None

    def result(self, limit_s: float) -> GuestsResult:
        """Wait for all of them. subprocess.TimeoutExpired after `limit_s`; `stop` then."""
        _, complaints = self._process.communicate(timeout=limit_s)
        if self._process.returncode:
            raise RuntimeError(f"the replayer exited with {self._process.returncode}: {complaints.decode()[-2000:]}")
        guests: list[dict[str, Any]] = json.loads(self._out.read_text(encoding="utf-8"))
        return GuestsResult(
            reads=sum(guest["reads"] for guest in guests),
            wrong=sum(guest["wrong"] for guest in guests),
            errors=tuple(error for guest in guests for error in guest["errors"]),
            stalls=tuple(tuple((begin, end) for begin, end in guest["stalls"]) for guest in guests),
            ended_at=tuple(guest["ended_at"] for guest in guests),
        )

    def stop(self) -> None:
        """End them now. A read that waits ends first: with Glance there, or with the mount."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def fairness(durations_s: Sequence[float]) -> str:
    """Shortest, median and longest, for people."""
    if not durations_s:
        return "nobody waited"
    shortest, median, longest = min(durations_s), statistics.median(durations_s), max(durations_s)
    return f"{shortest:.2f} / {median:.2f} / {longest:.2f} s"


def _program(scratch: Path) -> Path:
    """Python under a name that basefs knows as qemu's."""
    program = scratch / PROGRAM
    if not program.exists():
        shutil.copyfile(os.path.realpath(sys.executable), program)
        program.chmod(0o755)
    return program

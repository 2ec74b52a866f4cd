"""What the checks of cached chunks after a start cost: pieces read for the first time, and pieces read again, by turns.

A chunk is checked once in the life of a server, before it is served the first time; from then on it is read as one
that was never checked. So the cost of a check is the difference between the two, and it is measured in many short
rounds of one server: noise that lasts longer than a round hits both. Processor time is what noise hits least.
"""

import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench.report import Report
from tools.mount import BasefsMount
from tools.rig import Rig
from tools.soak.killer import server_pid

MIB = 1 << 20
PIECE_BYTES = 8 * MIB
SEQUENTIAL_ROUNDS = 96
RANDOM_ROUNDS = 30
RANDOM_READS = 256
"""In a piece, of 4 KiB each: they touch nearly each of its 128 chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one pass over a piece took: time, and processor time of the server."""

    wall_s: float
    cpu_s: float


class Reader:
    """Reads pieces of one file past the kernel's page cache of the mount."""

    def __init__(self, path: Path, pid: int) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, MIB)
        self._pid = pid

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)

    def sequential(self, piece: int) -> Cost:
        """One pass over a piece, 1 MiB a read."""
        return self._cost(range(piece * PIECE_BYTES, (piece + 1) * PIECE_BYTES, MIB), MIB)

    def random(self, piece: int) -> Cost:
        """RANDOM_READS of 4 KiB in a piece, the same ones each time."""
        pages = random.Random(piece).sample(range(PIECE_BYTES // 4096), RANDOM_READS)
        return self._cost([piece * PIECE_BYTES + page * 4096 for page in pages], 4096)

    def _cost(self, offsets: Sequence[int], size: int) -> Cost:
        cpu_s, begun = _cpu_s(self._pid), time.perf_counter()
        with memoryview(self._buffer) as whole, whole[:size] as target:
            for offset in offsets:
                if os.preadv(self._fd, [target], offset) != size:
                    raise RuntimeError(f"a short read at {offset}")
        return Cost(wall_s=time.perf_counter() - begun, cpu_s=_cpu_s(self._pid) - cpu_s)


def _cpu_s(pid: int) -> float:
    """Processor time of all threads of a process, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


def _rounds(read: Callable[[int], Cost], pieces: range) -> tuple[list[Cost], list[Cost]]:
    """Of each piece but the first: reading it for the first time, and reading the one before it again; by turns."""
    first, again = [], []
    read(pieces[0])
    for piece in pieces[1:]:
        if piece % 2:
            first.append(read(piece))
            again.append(read(piece - 1))
        else:
            again.append(read(piece - 1))
            first.append(read(piece))
    return first, again


def run(report: Report, scratch: Path) -> None:
    """Warm an image, start again, and read all of it by pieces."""
    pieces = SEQUENTIAL_ROUNDS + RANDOM_ROUNDS + 2
    report.part("verify", f"first and later reads of cached pieces of {PIECE_BYTES // MIB} MiB after a start")
    image = scratch / "image.raw"
    block = os.urandom(PIECE_BYTES)
    with open(image, "wb") as out:
        out.writelines(block for _ in range(pieces))
    with Rig(scratch / "rig") as rig:
        image_id = rig.place(image, "cached")
        with BasefsMount(scratch / "mount", rig.conf_lines()) as mount:
            mount.wait_for_images(1)
            mount.cli("image", "warm", image_id, "--wait", timeout_s=300)
            mount.unmount()
            mount.start()
            mount.status()  # what answers commands is imported after the start, in competition with reads
            pid = server_pid(mount)
            assert pid is not None
            reader = Reader(mount.path(image_id), pid)
            try:
                sequential = _rounds(reader.sequential, range(SEQUENTIAL_ROUNDS + 1))
                at_random = _rounds(reader.random, range(SEQUENTIAL_ROUNDS + 1, pieces))
            finally:
                reader.close()
    _report(report, "1 MiB sequential", sequential, reads=PIECE_BYTES // MIB)
    _report(report, "4 KiB random", at_random, reads=RANDOM_READS)


def _report(report: Report, what: str, costs: tuple[list[Cost], list[Cost]], *, reads: int) -> None:
    first, again = costs
    ratio = statistics.median(b.wall_s / a.wall_s for a, b in zip(first, again, strict=True))
    cpu_first, cpu_again = (statistics.median(one.cpu_s for one in costs) for costs in (first, again))
    report.tell(f"{what}, {len(first)} rounds: first / later throughput", f"{ratio:.3f}")
    report.tell("  processor time of the server, first", f"{cpu_first * 1e6 / reads:.0f} us a read")
    report.tell("  processor time of the server, later", f"{cpu_again * 1e6 / reads:.0f} us a read")

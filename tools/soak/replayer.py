"""Many guests in one process: each replays a trace with O_DIRECT, checks every byte, and notes what it waited for.

Run by `tools.soak.guests` with a Python whose file is called `qemu-system-...`, so basefs takes it for qemu. The
argument is a JSON object: `guests` ([path, number of the image] of each), `trace`, `spread_s`, `pace_s`. What comes
out is a JSON list: of each guest the reads done, wrong ones, errors, and [begin, end] of what took more than 50 ms.
"""

import json
import mmap
import os
import random
import sys
import threading
import time
from dataclasses import asdict, dataclass, field

from tools.soak.patterned import Trace, expected

STALL_S = 0.05
STACK_BYTES = 256 * 1024


@dataclass(slots=True)
class Guest:
    """One guest; times are CLOCK_MONOTONIC, which all processes share."""

    path: str
    number: int
    reads: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    stalls: list[tuple[float, float]] = field(default_factory=list)
    ended_at: float = 0.0

    def replay(self, trace: Trace, begin_s: float, pace_s: float) -> None:
        """Read the whole trace, beginning after `begin_s`, spread over `pace_s` unless reads take longer."""
        time.sleep(begin_s)
        begun = time.monotonic()
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            try:
                with mmap.mmap(-1, max(length for _, length in trace)) as buffer:
                    for index, (offset, length) in enumerate(trace):
                        ahead_s = begun + pace_s * index / len(trace) - time.monotonic()
                        if ahead_s > 0:
                            time.sleep(ahead_s)
                        self._read(fd, buffer, offset, length)
            finally:
                os.close(fd)
        except OSError as error:
            self.errors.append(str(error))
        self.ended_at = time.monotonic()

    def _read(self, fd: int, buffer: mmap.mmap, offset: int, length: int) -> None:
        begun = time.monotonic()
        with memoryview(buffer) as whole, whole[:length] as part:
            got = os.preadv(fd, [part], offset)
            ended = time.monotonic()
            self.reads += 1
            self.wrong += got != length or part != expected(self.number, offset, length)
        if ended - begun > STALL_S:
            self.stalls.append((begun, ended))


def main() -> None:
    work = json.loads(sys.argv[1])
    trace = [(offset, length) for offset, length in work["trace"]]
    guests = [Guest(path=path, number=number) for path, number in work["guests"]]
    rng = random.Random(len(guests))
    threading.stack_size(STACK_BYTES)
    threads = [
        threading.Thread(target=guest.replay, args=(trace, rng.uniform(0, work["spread_s"]), work["pace_s"]))
        for guest in guests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump([asdict(guest) for guest in guests], sys.stdout)


main()

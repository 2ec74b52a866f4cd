"""What all works share: who is measured, in which order, and one measurement."""

import contextlib
import mmap
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.peers.base import Peer, TooLongError
from tools.bench.peers.link import LOOPBACK
from tools.bench.peers.link_model import LinkSpec
from tools.bench.peers.peers import Basefs, BasefsTraced
from tools.bench.peers.record import Run
from tools.bench.peers.site import Access, Disk, Site
from tools.bench.replay import Trace

SECTOR = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One run of the benchmark: what is measured how often, and what came of it so far."""

    site: Site
    scratch: Path
    peers: tuple[type[Peer], ...]
    alternations: int
    guest_alternations: int
    slow_alternations: int
    limit_s: float
    trace: Trace
    say: Callable[[str], None]
    runs: list[Run] = field(default_factory=list)

    def turns(
        self, peers: Sequence[type[Peer]], work: str, link: str, alternations: int
    ) -> Iterator[tuple[int, type[Peer]]]:
        """Each peer in each alternation; who begins changes. A peer that was given up once is not tried again."""
        for alternation in range(alternations):
            first = alternation % len(peers)
            for peer in [*peers[first:], *peers[:first]]:
                if not any(
                    one.exceeded and (one.work, one.link, one.peer) == (work, link, peer.name) for one in self.runs
                ):
                    yield alternation, peer

    def add_value(self, work: str, link: LinkSpec, peer: str, alternation: int, value: float, unit: str) -> None:
        """Keep a rate."""
        self.add(Run(work=work, link=link.name, peer=peer, alternation=alternation, value=value, unit=unit))

    def add(self, run: Run) -> None:
        """Keep a run, and say so."""
        self.runs.append(run)
        value = f"{run.value:,.0f}" if run.unit == "IOPS" else f"{run.value:,.2f}"
        more = (
            f", {run.fetched_bytes / 1e6:,.1f} MB in {run.requests} requests" if run.fetched_bytes is not None else ""
        )
        given_up = "more than " if run.exceeded else ""
        self.say(f"{run.work}, {run.link}, {run.alternation + 1}: {run.peer}: {given_up}{value} {run.unit}{more}")


def measure(
    bench: Bench,
    peer: Peer,
    access: Access,
    work: str,
    alternation: int,
    act: Callable[[float], float | None],
    *,
    limit_s: float | None = None,
) -> None:
    """Let `act` do the work, and add a run with what it took of time, link, processors and memory.

    `act` is given the limit in seconds, the bench's or `limit_s`, and raises TooLongError when it is reached. It may
    return the seconds that count.
    """
    limit_s = limit_s or bench.limit_s
    crossed, used_s, begun = access.crossed(), _cpu_s(peer), time.monotonic()
    exceeded = False
    try:
        seconds = act(limit_s)
    except TooLongError:
        seconds, exceeded = limit_s, True
    seconds = time.monotonic() - begun if seconds is None else seconds
    since, cpu_s = access.crossed().since(crossed), _cpu_s(peer) - used_s
    bench.add(
        Run(
            work=work,
            link=access.spec.name,
            peer=peer.name,
            alternation=alternation,
            value=seconds,
            unit="s",
            exceeded=exceeded,
            fetched_bytes=since.down_bytes,
            requests=since.requests,
            cpu_s=max(0.0, cpu_s),
            memory_bytes=peer.usage().memory_bytes or None,
        )
    )


def _cpu_s(peer: Peer) -> float:
    """What its processes have used, and commands of ours that have ended: the guest's qemu among them."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return peer.usage().cpu_s + ended.ru_utime + ended.ru_stime


def replay(path: Path, trace: Trace, limit_s: float, original: Path | None = None) -> None:
    """Read what the trace says, one read at a time with O_DIRECT, as qemu's cache=none does.

    Reads are rounded out to sectors, as qemu does on a file that needs it. TooLongError when `limit_s` is over;
    RuntimeError when a byte differs from `original`.
    """
    end = time.monotonic() + limit_s
    with contextlib.ExitStack() as stack:
        buffer = stack.enter_context(mmap.mmap(-1, max(length for _, length in trace) + 2 * SECTOR))
        whole = stack.enter_context(memoryview(buffer))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        stack.callback(os.close, fd)
        right = os.open(original, os.O_RDONLY) if original else None
        if right is not None:
            stack.callback(os.close, right)
        for offset, length in trace:
            first = offset // SECTOR * SECTOR
            size = -(-(offset + length) // SECTOR) * SECTOR - first
            with whole[:size] as data:
                if os.preadv(fd, [data], first) != size:
                    raise RuntimeError(f"a short read at {first} of {path}")
                if right is not None and data != os.pread(right, size, first):
                    raise RuntimeError(f"wrong bytes at {first} of {path}")
            if time.monotonic() > end:
                raise TooLongError


@contextlib.contextmanager
def started(bench: Bench, kind: type[Peer], access: Access) -> Iterator[Peer]:
    """A peer that knows nothing yet, and is gone afterwards."""
    with kind(access, bench.scratch / "peer") as peer:
        yield peer


def record_trace(bench: Bench, read: Callable[[Basefs], object]) -> None:
    """Let basefs record the boot trace of `read`, for the peer that knows it before."""
    if BasefsTraced in bench.peers:
        with Access(bench.site, LOOPBACK) as access, Basefs(access, bench.scratch / "recorder") as peer:
            read(peer)
            bench.site.boot_trace = peer.recorded(bench.site.disks[0])


def replay_disk(bench: Bench, peer: Peer, disk: Disk, guest: int, limit_s: float) -> None:
    """Bring a disk for a guest and replay the trace on it, `limit_s` for both together."""
    end = time.monotonic() + limit_s
    path = peer.path(disk, guest, limit_s=limit_s)
    replay(path, bench.trace, end - time.monotonic())

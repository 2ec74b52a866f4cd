"""The reads of one guest's boot, replayed: on what nobody has read yet, and once more.

Also of many guests at once, of one disk and of a disk each.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tools.bench.peers.base import Peer
from tools.bench.peers.link_model import LinkSpec
from tools.bench.peers.peers import BasefsPacked, NovaDownload
from tools.bench.peers.site import Access
from tools.bench.peers.work import Bench, measure, record_trace, replay, replay_disk, started

COLD, WARM = "trace, cold", "trace, warm"


def many_name(guests: int, *, different: bool) -> str:
    """The work's name in tables."""
    return f"{guests} traces, {'different disks' if different else 'one disk'}"


def one_guest(bench: Bench, link: LinkSpec, alternations: int) -> None:
    """One guest, cold and warm; the bytes of each peer are compared the first time."""
    with Access(bench.site, link) as access:
        for alternation, kind in bench.turns(bench.peers, COLD, link.name, alternations):
            with started(bench, kind, access) as peer:
                disk = bench.site.disks[0]
                measure(bench, peer, access, COLD, alternation, functools.partial(replay_disk, bench, peer, disk, 0))
                if bench.runs[-1].exceeded:
                    continue
                path = peer.path(disk)
                measure(bench, peer, access, WARM, alternation, functools.partial(replay, path, bench.trace))
                if alternation == 0:
                    replay(path, bench.trace, bench.limit_s, disk.original)


def know_trace(bench: Bench) -> None:
    """Before the works of this module."""
    record_trace(bench, lambda peer: replay_disk(bench, peer, bench.site.disks[0], 0, bench.limit_s))


def many_guests(bench: Bench, link: LinkSpec, guests: int, *, different: bool) -> None:
    """Guests that begin at the same moment; the value is the last one's end."""
    work = many_name(guests, different=different)
    # nova downloads one after the other here, so different disks take it as many times as long as one.
    left_out = (BasefsPacked, NovaDownload) if different else (BasefsPacked,)
    kinds = [kind for kind in bench.peers if kind not in left_out]
    with Access(bench.site, link) as access:
        for alternation, kind in bench.turns(kinds, work, link.name, bench.slow_alternations):
            with started(bench, kind, access) as peer:
                measure(bench, peer, access, work, alternation, _at_once(bench, peer, guests, different=different))


def _at_once(bench: Bench, peer: Peer, guests: int, *, different: bool) -> Callable[[float], None]:
    """What replays all guests' traces; it ends with the last one, and fails with the first that did."""

    def act(limit_s: float) -> None:
        barrier = threading.Barrier(guests)

        def boot(guest: int) -> None:
            barrier.wait()
            replay_disk(bench, peer, bench.site.disks[guest if different else 0], guest, limit_s)

        pool = ThreadPoolExecutor(guests)
        try:
            for end in [pool.submit(boot, guest) for guest in range(guests)]:
                end.result()
        finally:
            pool.shutdown(wait=False)  # after a failure the others end with the peer

    return act

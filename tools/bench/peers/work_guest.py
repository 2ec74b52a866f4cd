"""A real Debian guest under qemu (TCG) to multi-user.target: on what nobody has read yet, and a second one.

Also several that begin at the same moment: four, for each has a GiB of memory and takes a processor for itself.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from basefs.core.trace_file import parse_trace
from tools.bench.peers.base import Peer, TooLongError
from tools.bench.peers.link_model import LinkSpec
from tools.bench.peers.peers import Basefs, BasefsTraced
from tools.bench.peers.site import Access
from tools.bench.peers.work import Bench, measure, record_trace, started
from tools.guest import BootTimeoutError, Guest, boot

COLD, WARM = "guest, cold", "guest, warm"
LIMIT_S = 240.0
WARM_ALSO = (Basefs,)
AT_ONCE = 4


def many_name(*, different: bool) -> str:
    """The name in tables of `AT_ONCE` guests."""
    return f"{AT_ONCE} guests, {'different disks' if different else 'one disk'}"


def know_trace(bench: Bench, guest: Guest) -> None:
    """Before the works of this module."""
    record_trace(bench, lambda peer: _boot(bench, peer, guest, COLD, LIMIT_S))
    if BasefsTraced in bench.peers:
        bench.site.guest_distinct_bytes = parse_trace(bench.site.boot_trace).traced_bytes


def one_guest(bench: Bench, link: LinkSpec, guest: Guest, kinds: Sequence[type[Peer]]) -> None:
    """Boot it from an overlay on each peer; a second one only on basefs: what others have then is a local file."""
    with Access(bench.site, link) as access:
        for alternation, kind in bench.turns(kinds, COLD, link.name, bench.guest_alternations):
            with started(bench, kind, access) as peer:
                for work in (COLD, WARM) if kind in WARM_ALSO else (COLD,):
                    act = functools.partial(_boot, bench, peer, guest, work)
                    measure(bench, peer, access, work, alternation, act, limit_s=LIMIT_S)


def many_guests(bench: Bench, link: LinkSpec, guest: Guest, kinds: Sequence[type[Peer]], *, different: bool) -> None:
    """Guests that begin at the same moment, cold; the value is the last one's end."""
    work = many_name(different=different)
    with Access(bench.site, link) as access:
        for alternation, kind in bench.turns(kinds, work, link.name, bench.slow_alternations):
            with started(bench, kind, access) as peer:
                act = _at_once(bench, peer, guest, different=different)
                measure(bench, peer, access, work, alternation, act, limit_s=LIMIT_S)


def _at_once(bench: Bench, peer: Peer, guest: Guest, *, different: bool) -> Callable[[float], None]:
    """What boots all guests; it ends with the last one, and fails with the first that did."""

    def act(limit_s: float) -> None:
        barrier = threading.Barrier(AT_ONCE)

        def one(number: int) -> None:
            barrier.wait()
            _boot(bench, peer, guest, f"guest {number}", limit_s, disk=number if different else 0)

        with ThreadPoolExecutor(AT_ONCE) as pool:  # each has its limit, so all end
            list(pool.map(one, range(AT_ONCE)))

    return act


def _boot(bench: Bench, peer: Peer, guest: Guest, work: str, limit_s: float, *, disk: int = 0) -> float:
    begun = time.monotonic()
    overlay = peer.directory / f"{work.rpartition(' ')[2]}.qcow2"  # qemu splits its options at commas
    options = peer.overlay(bench.site.disks[disk], overlay, limit_s=limit_s)
    prepared_s = time.monotonic() - begun
    try:
        return prepared_s + boot(overlay, guest, timeout_s=limit_s, drive_options=options, power_off=False).ready_s
    except BootTimeoutError as error:
        raise TooLongError from error

"""A real Debian guest under qemu (TCG) to multi-user.target: on what nobody has read yet, and a second one."""

import functools
import time
from collections.abc import Sequence

from tools.bench.peers.base import Peer, TooLongError
from tools.bench.peers.link_model import LinkSpec
from tools.bench.peers.peers import Basefs
from tools.bench.peers.site import Access
from tools.bench.peers.work import Bench, measure, record_trace, started
from tools.guest import BootTimeoutError, Guest, boot

COLD, WARM = "guest, cold", "guest, warm"
LIMIT_S = 240.0
WARM_ALSO = (Basefs,)


def know_trace(bench: Bench, guest: Guest) -> None:
    """Before the works of this module."""
    record_trace(bench, lambda peer: _boot(bench, peer, guest, COLD, LIMIT_S))


def one_guest(bench: Bench, link: LinkSpec, guest: Guest, kinds: Sequence[type[Peer]]) -> None:
    """Boot it from an overlay on each peer; a second one only on basefs: what others have then is a local file."""
    with Access(bench.site, link) as access:
        for alternation, kind in bench.turns(kinds, COLD, link.name, bench.guest_alternations):
            with started(bench, kind, access) as peer:
                for work in (COLD, WARM) if kind in WARM_ALSO else (COLD,):
                    act = functools.partial(_boot, bench, peer, guest, work)
                    measure(bench, peer, access, work, alternation, act, limit_s=LIMIT_S)


def _boot(bench: Bench, peer: Peer, guest: Guest, work: str, limit_s: float) -> float:
    begun = time.monotonic()
    overlay = peer.directory / f"{work.rpartition(' ')[2]}.qcow2"  # qemu splits its options at commas
    options = peer.overlay(bench.site.disks[0], overlay, limit_s=limit_s)
    prepared_s = time.monotonic() - begun
    try:
        return prepared_s + boot(overlay, guest, timeout_s=limit_s, drive_options=options, power_off=False).ready_s
    except BootTimeoutError as error:
        raise TooLongError from error

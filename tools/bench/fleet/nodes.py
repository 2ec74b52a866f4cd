"""Mounts of many nodes on this one machine, and the recorded boot on all of them at the same moment."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.bench import replay
from tools.bench.fleet.network import Network
from tools.bench.fleet.record import FleetRun
from tools.bench.fleet.ways import Way
from tools.bench.peers.base import usage_of
from tools.bench.restart import wait_for_standby
from tools.mount import BasefsMount

MOUNTS_AT_ONCE = 2
"""That many processors start them as fast as more would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What every node does: replay `trace` on the image, whose bytes are those of `original`."""

    image_id: str
    original: Path
    trace: replay.Trace


@contextlib.contextmanager
def mounted(
    network: Network, count: int, directory: Path, conf: str, options: dict[str, object]
) -> Iterator[list[BasefsMount]]:
    """Mounts of `count` nodes, which know the image's name and none of its bytes; gone afterwards."""
    mounts = [
        BasefsMount(directory / f"node{node}", conf, options, prefix=network.prefix(node)) for node in range(count)
    ]
    try:
        pool = ThreadPoolExecutor(MOUNTS_AT_ONCE)
        try:
            list(pool.map(_start, mounts))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure none is begun any more
        yield mounts
    finally:
        with ThreadPoolExecutor(MOUNTS_AT_ONCE) as pool:
            list(pool.map(BasefsMount.stop, mounts))


def _start(mount: BasefsMount) -> None:
    mount.start()
    wait_for_standby(mount)  # a node that guests come to is older than a second
    mount.wait_for_images(1)


def measured(way: Way, network: Network, count: int, directory: Path, boot: Boot) -> FleetRun:
    """`count` nodes boot the image cold by this way; RuntimeError when one of them read a wrong byte."""
    with (
        way.running(directory / "way") as options,
        mounted(network, count, directory, way.rig.conf_lines(), options) as mounts,
    ):
        sent, used = way.sent(), [usage_of(mount.pids()) for mount in mounts]
        seconds = _at_once(mounts, boot)
        sent = way.sent().since(sent)
        usages = [usage_of(mount.pids()) for mount in mounts]
        for mount in (mounts[0], mounts[-1]):
            if wrong := replay.differences(mount.path(boot.image_id), boot.original, boot.trace):
                raise RuntimeError(f"{way.name}, {count} nodes: {wrong} reads with wrong bytes on {mount.directory}")
        return FleetRun(
            way=way.name,
            nodes=count,
            first_s=min(seconds),
            last_s=max(seconds),
            glance_bytes=sent.glance_bytes,
            glance_requests=sent.glance_requests,
            asked=sent.asked,
            glance_cpu_s=sent.glance_cpu_s,
            other_bytes=sent.other_bytes,
            other_requests=sent.other_requests,
            other_cpu_s=sent.other_cpu_s,
            nodes_cpu_s=sum(after.cpu_s - before.cpu_s for before, after in zip(used, usages, strict=True)),
            node_memory_bytes=max(one.memory_bytes for one in usages),
        )


def _at_once(mounts: list[BasefsMount], boot: Boot) -> list[float]:
    """Seconds of each node's boot, from the moment at which all began."""
    barrier = threading.Barrier(len(mounts))
    begun: list[float] = []

    def one(mount: BasefsMount) -> float:
        if barrier.wait() == 0:
            begun.append(time.monotonic())
        replay.replay(mount.path(boot.image_id), boot.trace)
        return time.monotonic()

    with ThreadPoolExecutor(len(mounts)) as pool:
        ends = list(pool.map(one, mounts))
    return [end - begun[0] for end in ends]

"""Reading past Glance, from a real Ceph: rbd beside librbd called directly, and a cold boot over rbd beside Glance.

Ceph keeps its objects in memory and shares this machine's cores with who reads, so what counts are the ratios.
"""

import contextlib
import os
import random
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from basefs.config.store_options import RbdSettings
from basefs.sources.ceph_cluster import CephLibrary, load_library
from basefs.sources.rbd_store import RbdObject, RbdStore
from tools.bench import replay
from tools.bench.report import Report
from tools.guest import build
from tools.mount import BasefsMount
from tools.rig import Rig

MIB = 1 << 20
IMAGE_BYTES = 512 * MIB
READS = 12_000
READ_BYTES = 4096
DEPTH = 16
REQUEST_BYTES = 8 * MIB
"""As `fetch_request_bytes_max`; by so many workers as `fetch_threads_max`."""
WORKERS = 8
ROUNDS = 3
BALLAST_BYTES = 4096 * MIB
"""Of a data partition behind that of the system, where the image is long and its boot is not."""
TAIL_BYTES = MIB
"""The end of the disk stays its end: there GPT has its copy, and every boot reads it."""


def run(report: Report, scratch: Path) -> None:
    """Measure both, and compare bytes."""
    report.part("stores", "images read from a real Ceph (objects in memory) on loopback")
    library = load_library()
    if library is None:
        raise SystemExit("no librbd: run `tools/setup ceph`")
    with Rig(scratch / "rig", object_stores=True) as rig:
        _reads(report, rig, library)
        _boot(report, rig, scratch)


# -- the store itself


def _reads(report: Report, rig: Rig, library: CephLibrary) -> None:
    image_id = str(uuid.uuid4())
    with _pool(rig, library) as (fsid, pool):
        _make_image(library, pool, image_id)
        with library.rbd.Image(pool, image_id, snapshot="snap", read_only=True) as image:
            offsets = [random.randrange(IMAGE_BYTES // READ_BYTES) * READ_BYTES for _ in range(READS)]
            location = f"rbd://{fsid}/images/{image_id}/snap"
            random_ratios, sequential_ratios = [], []
            for number in range(ROUNDS):
                direct = READS / trio.run(_direct_random, image, offsets)
                ours = READS / _with_object(rig, location, image_id, _store_random, offsets)
                exported = IMAGE_BYTES / MIB / _export(rig, image_id)
                sequential = IMAGE_BYTES / MIB / _with_object(rig, location, image_id, _store_sequential, offsets)
                report.note(
                    f"round {number}: 4 KiB {direct:,.0f} direct, {ours:,.0f} by the store a second; "
                    f"sequential {exported:,.0f} MiB/s rbd export, {sequential:,.0f} by the store"
                )
                random_ratios.append(ours / direct)
                sequential_ratios.append(sequential / exported)
    report.at_least(f"rbd, 4 KiB random at depth {DEPTH}, of librbd directly", sorted(random_ratios)[ROUNDS // 2], 0.6)
    report.at_least("rbd, sequential, of rbd export", sorted(sequential_ratios)[ROUNDS // 2], 0.8)


@contextlib.contextmanager
def _pool(rig: Rig, library: CephLibrary) -> Iterator[tuple[str, Any]]:
    cluster = library.rados.Rados(conffile=rig.ceph.conf_path, rados_id="admin", conf={"rbd_cache": "false"})
    cluster.connect()
    pool = cluster.open_ioctx("images")
    try:
        yield cluster.get_fsid(), pool
    finally:
        pool.close()
        cluster.shutdown()


def _make_image(library: CephLibrary, pool: Any, image_id: str) -> None:
    library.rbd.RBD().create(pool, image_id, IMAGE_BYTES, 23, old_format=False, features=61)
    with library.rbd.Image(pool, image_id) as image:
        for offset in range(0, IMAGE_BYTES, 8 * MIB):
            image.write(os.urandom(8 * MIB), offset)
        image.create_snap("snap")


async def _direct_random(image: Any, offsets: list[int]) -> float:
    """Return the seconds of a loop of its own in Python, DEPTH reads in flight, completed into a counter."""
    left = iter(offsets)
    token, done = trio.lowlevel.current_trio_token(), trio.Event()
    in_flight = DEPTH

    def completed(completion: Any, data: bytes) -> None:
        nonlocal in_flight
        assert completion.get_return_value() == READ_BYTES == len(data)
        offset = next(left, None)
        if offset is not None:
            image.aio_read(offset, READ_BYTES, completed)
            return
        in_flight -= 1
        if not in_flight:
            token.run_sync_soon(done.set)

    begun = time.monotonic()
    for _ in range(DEPTH):
        image.aio_read(next(left), READ_BYTES, completed)
    await done.wait()
    return time.monotonic() - begun


def _with_object(
    rig: Rig, location: str, image_id: str, measure: Callable[[RbdObject, list[int]], Any], offsets: list[int]
) -> float:
    settings = RbdSettings(
        pools=("images",), ceph_conf=rig.ceph.conf_path, user="basefs", connect_timeout_s=5, op_timeout_s=10
    )

    async def main() -> float:
        store = RbdStore(settings, threads_max=DEPTH)
        found = await store.open(location, image_id=image_id, size=IMAGE_BYTES)
        seconds: float = await measure(found, offsets)
        await found.close()
        await store.close()
        return seconds

    return trio.run(main)


async def _store_random(found: RbdObject, offsets: list[int]) -> float:
    def fetch(offset: int) -> Any:
        return found.fetch_range(offset=offset, length=READ_BYTES, piece_bytes=READ_BYTES, deliver=_take)

    return await _workers(DEPTH, offsets, fetch)


async def _store_sequential(found: RbdObject, _offsets: list[int]) -> float:
    def fetch(offset: int) -> Any:
        return found.fetch_range(offset=offset, length=REQUEST_BYTES, piece_bytes=MIB, deliver=_take)

    return await _workers(WORKERS, list(range(0, IMAGE_BYTES, REQUEST_BYTES)), fetch)


async def _workers(count: int, offsets: list[int], fetch: Callable[[int], Any]) -> float:
    left = iter(offsets)

    async def work() -> None:
        for offset in left:
            await fetch(offset)

    begun = time.monotonic()
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(work)
    return time.monotonic() - begun


def _take(_offset: int, _piece: memoryview) -> bool:
    return True


def _export(rig: Rig, image_id: str) -> float:
    argv = ["rbd", "-c", rig.ceph.conf_path, "export", "--no-progress", f"images/{image_id}@snap", "-"]
    begun = time.monotonic()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


# -- a boot


def _with_ballast(system: Path, disk: Path, trace: replay.Trace) -> replay.Trace:
    """Make `disk` of the system's, with BALLAST_BYTES before its last TAIL_BYTES; return where it is read then."""
    subprocess.run(["cp", "--sparse=always", str(system), str(disk)], check=True)
    tail_at = disk.stat().st_size - TAIL_BYTES
    block = os.urandom(16 * MIB)
    with disk.open("r+b") as out:
        out.seek(tail_at)
        tail = out.read()
        out.seek(tail_at)
        out.writelines(block for _ in range(BALLAST_BYTES // len(block)))
        out.write(tail)
    return [(offset + (BALLAST_BYTES if offset >= tail_at else 0), length) for offset, length in trace]


def _boot(report: Report, rig: Rig, scratch: Path) -> None:
    trace = replay.load_trace()
    disk = scratch / "disk.raw"
    trace = _with_ballast(build().disk, disk, trace)
    in_ceph = rig.upload(disk, "debian12", store="ceph")
    report.note("image in Ceph")
    in_file = rig.place(disk, "debian12-file")
    patient = {"other_io_deadline_s": 300}  # the stream comes to the end of the disk only then
    rbd = {"rbd.pools": "images", "rbd.ceph_conf": rig.ceph.conf_path}
    seconds: dict[str, list[float]] = {"rbd": [], "stream": [], "ranges": []}
    wrong = 0
    for number in range(ROUNDS):
        for way, image_id, options in (("rbd", in_ceph, rbd), ("stream", in_ceph, {}), ("ranges", in_file, {})):
            with BasefsMount(scratch / f"{way}-{number}", rig.conf_lines(), {**patient, **options}) as mount:
                path = mount.path(image_id)
                seconds[way].append(replay.replay(path, trace))
                if number == 0:
                    wrong += replay.differences(path, disk, trace)
            shutil.rmtree(scratch / f"{way}-{number}")  # a stream's cache is all of the disk
        report.note(", ".join(f"{way} {times[-1]:.2f} s" for way, times in seconds.items()))
    medians = {way: sorted(times)[ROUNDS // 2] for way, times in seconds.items()}
    report.tell("size of the image", f"{disk.stat().st_size / MIB:,.0f} MiB")
    report.at_least("rbd, cold boot, faster than Glance's stream", medians["stream"] / medians["rbd"], 3)
    report.at_most("rbd, cold boot, of Glance's ranges from files", medians["rbd"] / medians["ranges"], 1.2)
    report.at_most("reads with a wrong byte", wrong, 0)

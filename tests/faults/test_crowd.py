"""Many readers at once: one request for what all of them want, and nobody waits for what he does not need."""

import errno
import json
import os
import threading
import time
from contextlib import ExitStack

import pytest

from tests.conftest import MountFactory
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.faults.conftest import HEADER_BYTES, MIB, Site
from tests.faults.readers import LIMIT_S, errno_of, eventually, opened, pread, read_at, reader_threads
from tools.mount import base_name

pytestmark = pytest.mark.mount

PART = 64 * 1024
PATIENT = {"other_io_deadline_s": LIMIT_S, "lookup_deadline_s": LIMIT_S}


def test_200_readers_of_one_cold_chunk_make_one_get(front: MisbehavingFront, basefs_mount: MountFactory) -> None:
    data = os.urandom(3 * MIB)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines(), PATIENT)
    path = mount.mountpoint / base_name(image_id)
    release = threading.Event()
    with opened(path) as fd, reader_threads(200) as pool:
        front.on("/file").respond(answers.hang(release))
        asked, asked_before = front.count("/file"), reads_asked(mount.mountpoint)
        try:
            reads = [pool.submit(pread, fd, 2 * MIB + PART * (n % 2), 4096) for n in range(200)]
            eventually(lambda: reads_asked(mount.mountpoint) >= asked_before + 200)
        finally:
            release.set()
        got = [read.result() for read in reads]
        assert front.count("/file") - asked == 1
    assert got == [data[2 * MIB + PART * (n % 2) :][:4096] for n in range(200)]


def reads_asked(mountpoint: os.PathLike[str]) -> int:
    """Reads that the server was asked for so far, as its status tells; that of the status itself is one."""
    with open(os.path.join(mountpoint, ".basefs", "status.json"), encoding="utf-8") as file:
        return int(json.load(file)["fuse_requests"].get("read", 0))


@pytest.mark.parametrize(("is_direct", "readers"), [(True, 1100), (False, 300)], ids=["direct", "buffered"])
def test_waiting_reads_delay_no_stat_no_listing_and_no_cached_read(
    is_direct: bool, readers: int, front: MisbehavingFront, basefs_mount: MountFactory
) -> None:
    data = os.urandom(3 * MIB)
    cached_id = front.glance.add(data)
    images = [front.glance.add(os.urandom(2 * MIB)) for _ in range(10)]
    mount = basefs_mount(front.conf_lines(), {**PATIENT, "other_io_deadline_s": 4 * LIMIT_S})
    cached = mount.mountpoint / base_name(cached_id)
    assert read_at(cached, 0, len(data)) == data
    release = threading.Event()
    with ExitStack() as stack:
        fds = []
        for image_id in images:
            fds.append(os.open(mount.mountpoint / base_name(image_id), os.O_RDONLY | os.O_DIRECT * is_direct))
            stack.callback(os.close, fds[-1])
            os.posix_fadvise(fds[-1], 0, 0, os.POSIX_FADV_RANDOM)
        pool = stack.enter_context(reader_threads(readers))
        read = pread if is_direct else (lambda fd, offset, length: os.pread(fd, length, offset))
        front.on("/file").respond(answers.hang(release))
        asked_before = reads_asked(mount.mountpoint)
        offsets = [HEADER_BYTES + n * 8192 for n in range(readers // len(images))]
        try:
            waiting = [pool.submit(read, fd, offset, 4096) for fd in fds for offset in offsets]
            eventually(lambda: reads_asked(mount.mountpoint) >= asked_before + readers)
            took_s = []
            for call in (
                lambda: os.listdir(mount.mountpoint),
                lambda: os.stat(cached),
                lambda: os.stat(mount.mountpoint / f"{cached.name}.part"),
                lambda: cached.read_bytes() == data,
                lambda: read_at(cached, 0, len(data)) == data,
            ):
                for _ in range(8):
                    begun = time.monotonic()
                    errno_of(call)
                    took_s.append(time.monotonic() - begun)
            assert not any(one.done() for one in waiting)
            took_s.sort()
            p99_s = took_s[int(0.99 * len(took_s))]
            assert p99_s < 2.0, "hundreds of times what it takes, and no deadline of anybody"
        finally:
            release.set()
        for one in waiting:
            assert len(one.result()) == 4096


def test_many_openers_and_removers_of_one_image_get_right_bytes(site: Site) -> None:
    image = site.add()
    rounds = 30

    def use(_index: int) -> None:
        for _ in range(rounds):
            assert read_at(image.path, HEADER_BYTES, PART) == image.part(HEADER_BYTES, PART)

    def remove() -> None:
        for _ in range(rounds):
            image.path.unlink()

    site.may_log("did not come within 1 s")
    with reader_threads(4) as pool:
        users = [pool.submit(use, index) for index in range(3)]
        remover = pool.submit(remove)
        for user in users:
            failure = user.exception()
            assert failure is None or (isinstance(failure, OSError) and failure.errno == errno.EIO), failure
            assert failure is None or any("within 1 s" in line for line in site.mount.log_text.splitlines()), failure
        remover.result()
    assert read_at(image.path, 0, len(image.data)) == image.data

"""kill -9 at any moment: no wrong byte afterwards, and nothing that was here is fetched again."""

import errno
import json
import os
import random
import select
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from basefs.core.chunk_map import PAGE, SUMS_OFFSET, parse_header
from basefs.keeper_restarts import KILLED_QUICK_S
from basefs.keeper_setup import lock_holder
from basefs.keeper_spec import KeeperSpec, command_line
from basefs.service.server import STOP_LIMIT_S
from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.faults.conftest import HEADER_BYTES, MIB
from tests.faults.readers import LIMIT_S, eventually, opened, pread
from tools.mount import BasefsMount, base_name
from tools.soak.killer import KILLED_SERVERS_LOG, server_pid, signal_server

pytestmark = pytest.mark.mount

CHUNK = 64 * 1024
ROUNDS = 6
READERS = 3
GONE = (errno.ENOTCONN, errno.ECONNABORTED)


class Readers:
    """Threads that read random parts and compare, until the mount is gone or they are told to stop."""

    def __init__(self, path: Path, data: bytes, seed: int) -> None:
        self.reads = 0
        self.failures: list[str] = []
        self._path = path
        self._data = data
        self._stop = threading.Event()
        self._progress = threading.Condition()
        self._threads = [threading.Thread(target=self._run, args=(seed * 100 + n,)) for n in range(READERS)]

    @contextmanager
    def running(self) -> Iterator["Readers"]:
        """They read while the block runs."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def wait_for(self, reads: int) -> None:
        """Return after that many further reads."""
        with self._progress:
            wanted = self.reads + reads
            assert self._progress.wait_for(lambda: self.reads >= wanted or self.failures, LIMIT_S), self.reads

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        try:
            with opened(self._path) as fd:
                while not self._stop.is_set():
                    offset = rng.randrange(len(self._data) // 4096) * 4096
                    length = min(rng.choice((4096, CHUNK, 5 * CHUNK)), len(self._data) - offset)
                    if pread(fd, offset, length) != self._data[offset : offset + length]:
                        self._fail(f"wrong bytes in {length} at {offset}")
                    with self._progress:
                        self.reads += 1
                        self._progress.notify_all()
        except OSError as error:
            self._fail(f"{errno.errorcode[error.errno or 0]}")

    def _fail(self, what: str) -> None:
        with self._progress:
            self.failures.append(what)
            self._progress.notify_all()


def start_keeper(mount: BasefsMount) -> "subprocess.Popen[bytes]":
    """The keeper alone, without the command before it, which costs half the time; serving when this returns."""
    read_fd, write_fd = os.pipe()
    spec = KeeperSpec(
        mountpoint=str(mount.mountpoint),
        cache_dir=str(mount.cache_dir),
        config_files=[str(mount.conf_path)],
        config_dirs=[],
        ready_fd=write_fd,
    )
    with os.fdopen(read_fd, "rb") as answer, open(mount.log_path, "ab") as log:
        try:
            keeper = subprocess.Popen(command_line(spec), env=mount.environment, stderr=log, pass_fds=[write_fd])
        finally:
            os.close(write_fd)
        assert json.loads(answer.readline())["ready"] is True
    return keeper


def kill(*pids: int) -> None:
    """kill -9 all of them at once; they have ended when it returns."""
    pidfds = [os.pidfd_open(pid) for pid in pids]
    try:
        for pidfd in pidfds:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], LIMIT_S)[0]
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def chunks_here(mount: BasefsMount) -> set[int]:
    """The chunks that have a checksum in the image's map."""
    found = list((mount.cache_dir / "chunks").glob("*.map"))
    raw = found[0].read_bytes() if found else b""
    if len(raw) < PAGE:
        return set()
    try:
        header = parse_header(raw[:PAGE])
    except ValueError:
        return set()
    sums = struct.unpack_from(f"<{header.chunks}Q", raw, SUMS_OFFSET)
    return {index for index, value in enumerate(sums) if value}


def chunks_asked(front: MisbehavingFront, since: int) -> list[int]:
    """The chunks in the ranges asked for since request number `since`; the checks' header is not counted."""
    asked: list[int] = []
    for request in front.requests("/file")[since:]:
        first, last = request.range or (0, 0)
        if (first, last) != (0, HEADER_BYTES - 1):
            asked += range(first // CHUNK, last // CHUNK + 1)
    return asked


def test_kill_9_of_everything_at_any_moment_costs_no_byte_and_no_second_fetch(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    rng = random.Random(20261122)
    data = rng.randbytes(32 * MIB + 12345)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines(), start=False)
    expected_warnings("removing the mount that a basefs left behind")
    path = mount.mountpoint / base_name(image_id)
    front.on("/file").respond(answers.slow(bytes_per_s=6 * MIB))
    for seed in range(ROUNDS):
        here, since = chunks_here(mount), front.count("/file")
        keeper = start_keeper(mount)
        if seed == 0:
            os.utime(path)  # nova's pre-cache call: it is warmed meanwhile
        holder = lock_holder(mount.cache_dir)
        assert holder is not None
        with Readers(path, data, seed).running() as readers:
            readers.wait_for(rng.randint(1, 25))
            kill(keeper.pid, holder["server_pid"])
            keeper.wait()
        assert all(failure in map(errno.errorcode.get, GONE) for failure in readers.failures), readers.failures
        asked = chunks_asked(front, since)
        assert not here & set(asked), "what was here is not fetched again"
        assert len(asked) == len(set(asked)), "nothing is fetched twice in one life"
    here, since = chunks_here(mount), front.count("/file")
    assert 0 < len(here) < len(data) // CHUNK, "the rounds got somewhere, and not to the end"
    front.behave()
    mount.start()
    assert path.read_bytes() == data
    assert not here & set(chunks_asked(front, since))
    status = json.loads((mount.mountpoint / ".basefs" / "status.json").read_text())
    assert status["damaged_chunks"] == 0


def test_kill_9_of_the_server_fails_no_read(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    rng = random.Random(7)
    data = rng.randbytes(16 * MIB + 1)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines())
    expected_warnings("|".join(KILLED_SERVERS_LOG))
    front.on("/file").respond(answers.slow(bytes_per_s=8 * MIB))
    with Readers(mount.mountpoint / base_name(image_id), data, 1).running() as readers:
        for _ in range(4):
            readers.wait_for(rng.randint(1, 30))
            threading.Event().wait(2 * KILLED_QUICK_S)  # else the keeper suspects what it hands out, and waits
            holder = lock_holder(mount.cache_dir)
            assert holder is not None
            kill(holder["server_pid"])
            readers.wait_for(READERS + 1)  # so at least one that began after it
    assert not readers.failures


def test_servers_killed_at_any_moment_of_their_start_fail_no_read(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    data = random.Random(10).randbytes(8 * MIB + 1)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines(), {"other_io_deadline_s": LIMIT_S})
    expected_warnings("|".join(KILLED_SERVERS_LOG))
    with Readers(mount.mountpoint / base_name(image_id), data, 2).running() as readers:
        for delay_s in (0.0, 0.15, 0.3):
            readers.wait_for(READERS + 1)
            threading.Event().wait(2 * KILLED_QUICK_S)  # else the keeper suspects what it hands out, and waits
            first = server_pid(mount)
            assert first is not None
            kill(first)
            eventually(lambda first=first: server_pid(mount) not in (None, first))
            threading.Event().wait(delay_s)
            signal_server(mount, signal.SIGKILL)
        readers.wait_for(READERS + 1)
    assert not readers.failures


def test_a_server_killed_while_it_waits_for_glance_leaves_the_wait_to_the_next(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    data = random.Random(8).randbytes(3 * MIB)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines(), {"other_io_deadline_s": LIMIT_S})
    expected_warnings("|".join(KILLED_SERVERS_LOG))
    release = threading.Event()
    with opened(mount.mountpoint / base_name(image_id)) as fd:
        front.on("/file").respond(answers.hang(release))
        asked = front.count("/file")
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(pread(fd, 2 * MIB, CHUNK)))
        reader.start()
        try:
            eventually(lambda: front.count("/file") == asked + 1)
            holder = lock_holder(mount.cache_dir)
            assert holder is not None
            kill(holder["server_pid"])
            eventually(lambda: front.count("/file") == asked + 2)
        finally:
            release.set()
            reader.join()
    assert got == [data[2 * MIB :][:CHUNK]]


def test_a_server_without_a_keeper_ends_soon_after_the_unmount_although_glance_hangs(
    front: MisbehavingFront, basefs_mount: MountFactory
) -> None:
    image_id = front.glance.add(random.Random(9).randbytes(3 * MIB))
    mount = basefs_mount(front.conf_lines())
    path = mount.mountpoint / base_name(image_id)
    path.stat()
    front.on("/file").respond(answers.hang(threading.Event()))
    asked = front.count("/file")
    os.utime(path)  # warms it: a thread of the server is in a request that nobody answers
    eventually(lambda: front.count("/file") > asked)
    holder = lock_holder(mount.cache_dir)
    assert holder is not None
    kill(holder["keeper_pid"])
    server = os.pidfd_open(holder["server_pid"])
    try:
        subprocess.run(["umount", str(mount.mountpoint)], check=True)
        assert select.select([server], [], [], STOP_LIMIT_S + 3.0)[0]
    finally:
        os.close(server)

"""kill -9 and SIGSTOP of reader processes: no read has a wrong byte, no call fails or runs twice."""

import contextlib
import mmap
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.faults.readers import eventually
from tools.mount import BasefsMount, reader_pids
from tools.rig import Rig
from tools.soak.killer import KILLED_SERVERS_LOG, Killer, again
from tools.soak.lower_writers import lower_writers

pytestmark = [pytest.mark.mount, pytest.mark.glance]

MIB = 1 << 20
IMAGE_BYTES = 12 * MIB
READER_DIED = r"reader \d+ died \(signal SIGKILL\)"
SMALL_CACHE = {"cache_max_bytes": 8 * MIB, "cache_min_free_bytes": 0, "fetch_request_bytes_max": MIB}
"""Less than the image: it is evicted and fetched all the time."""


class Looper:
    """Calls `step` again and again in a thread until it is stopped; `error` is what ended it before."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.rounds = 0
        self.error: BaseException | None = None
        self._step = step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._step()
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def looping(*steps: Callable[[], None]) -> Iterator[list[Looper]]:
    loopers = [Looper(step) for step in steps]
    try:
        yield loopers
    finally:
        for looper in loopers:
            looper.end()
    for looper in loopers:
        if looper.error is not None:
            raise looper.error
        assert looper.rounds


def verifier(path: Path, content: bytes, seed: int) -> Callable[[], None]:
    """One read with O_DIRECT, its bytes compared."""
    chance = random.Random(seed)
    buffer = memoryview(mmap.mmap(-1, MIB))

    def step() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            for _ in range(20):
                size = chance.choice([4096, 4096, 4096, 65536, MIB])
                offset = chance.randrange(0, len(content), 4096)
                length = os.preadv(fd, [buffer[:size]], offset)
                assert length == min(size, len(content) - offset)
                assert buffer[:length] == content[offset : offset + length], f"other bytes at {offset}, {length}"
        finally:
            os.close(fd)

    return step


def renamer(directory: Path) -> Callable[[], None]:
    """Calls that each succeed exactly once: one that ran twice says EEXIST or ENOENT."""
    directory.mkdir()
    first, second, third = directory / "first", directory / "second", directory / "third"

    def step() -> None:
        first.mkdir()
        first.rename(second)
        second.rmdir()
        os.close(os.open(first, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.link(first, second)
        second.rename(third)
        second.symlink_to("third")
        for path in (first, second, third):
            path.unlink()
        assert os.listdir(directory) == []

    return step


def kill_one(mount: BasefsMount, seed: int) -> Callable[[], bool]:
    chance = random.Random(seed)

    def act() -> bool:
        pids = reader_pids(mount)
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(pids), signal.SIGKILL)
        return True

    return act


def packed(directory: Path, seed: int) -> tuple[Path, bytes]:
    """A compressed qcow2 file, and the disk in it."""
    disk = b"".join(random.Random(seed + at).randbytes(2048) * 2 for at in range(4 * MIB // 4096))
    (directory / "disk").write_bytes(disk)
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", directory / "disk", directory / "qcow2"], check=True)
    return directory / "qcow2", disk


def test_readers_that_are_killed_cost_nothing_and_do_nothing_twice(
    rig: Rig, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings, tmp_path: Path
) -> None:
    content = os.urandom(IMAGE_BYTES)
    (tmp_path / "image").write_bytes(content)
    expected_warnings(READER_DIED)
    mount = basefs_mount(rig, {"readers": 2, **SMALL_CACHE})
    path = mount.path(rig.upload(tmp_path / "image", "image"))
    eventually(lambda: len(reader_pids(mount)) == 2)
    file, disk = packed(tmp_path, 1)
    packed_path = mount.path(rig.upload(file, "packed", "qcow2"))
    steps = [verifier(path, content, 1), verifier(path, content, 2), verifier(packed_path, disk, 3)]
    steps += [renamer(mount.mountpoint / f"names-{number}") for number in range(2)]
    with (
        lower_writers(mount.mountpoint, 1) as writers,
        looping(*steps),
        again(kill_one(mount, 1), least_s=0.05, most_s=0.4) as killing,
    ):
        eventually(lambda: killing.done >= 12)
    assert [error for writer in writers for error in writer.errors] == []
    assert mount.status()["deaths"] == 0
    assert "handed out again" not in mount.log_text


def test_readers_and_servers_that_are_killed_cost_no_read(
    rig: Rig, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings, tmp_path: Path
) -> None:
    content = os.urandom(IMAGE_BYTES)
    (tmp_path / "image").write_bytes(content)
    expected_warnings("|".join((READER_DIED, *KILLED_SERVERS_LOG)))
    mount = basefs_mount(rig, {"readers": 2, **SMALL_CACHE})
    path = mount.path(rig.upload(tmp_path / "image", "image"))
    file, disk = packed(tmp_path, 1)
    packed_path = mount.path(rig.upload(file, "packed", "qcow2"))
    with (
        lower_writers(mount.mountpoint, 2) as writers,
        looping(
            *(verifier(path, content, seed) for seed in range(2)),
            *(verifier(packed_path, disk, seed) for seed in range(2)),
        ),
        again(kill_one(mount, 1), least_s=0.1, most_s=0.5) as killing,
        again(Killer(mount), least_s=0.7, most_s=1.5) as killing_servers,
    ):
        eventually(lambda: killing.done >= 6 and killing_servers.done >= 2)
    assert [error for writer in writers for error in writer.errors] == []


def test_a_reader_that_hangs_is_replaced_and_what_it_had_taken_is_answered(
    rig: Rig, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings, tmp_path: Path
) -> None:
    content = os.urandom(4 * MIB)
    (tmp_path / "image").write_bytes(content)
    expected_warnings(r"reader 0 hangs: it answers nothing for 2 s; killing it")
    expected_warnings(r"reader 0 died \(hung for 2 s\)")
    mount = basefs_mount(rig, {"readers": 1, "watchdog_s": 2})
    path = mount.path(rig.upload(tmp_path / "image", "image"))
    eventually(lambda: len(reader_pids(mount)) == 1)
    step = verifier(path, content, 1)
    step()
    (pid,) = reader_pids(mount)
    os.kill(pid, signal.SIGSTOP)
    with looping(step, renamer(mount.mountpoint / "names")):
        eventually(lambda: reader_pids(mount) not in ([], [pid]))

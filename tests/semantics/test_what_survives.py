"""docs/SEMANTICS.md, section 12: what is open, and what was changed, when the server is killed."""

import fcntl
import json
import mmap
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from basefs.keeper_restarts import KILLED_QUICK_S
from tests.conftest import ExpectedWarnings
from tests.fakes.front import MisbehavingFront
from tests.faultfs import FaultFs
from tests.semantics.conftest import errno_of, eventually, opened, report, status, wait_for_images
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

DATA = Random(11).randbytes(3_000_000)
OFFSET = 2_000_000
OLD_NS = 1_000_000_000_000_000_000
HEALED = "is stored on the disk again"


@pytest.fixture
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        yield running


@pytest.fixture
def mount(
    front: MisbehavingFront, basefs_mount: Callable[..., BasefsMount], expected_warnings: ExpectedWarnings
) -> BasefsMount:
    expected_warnings(r"died \(signal SIGKILL\)")
    return basefs_mount(front.conf_lines())


def kill_server(mount: BasefsMount) -> None:
    """kill -9; on return another one serves. Not so soon that the keeper suspects what it had handed out again."""
    threading.Event().wait(2 * KILLED_QUICK_S)
    pid = status(mount)["server_pid"]
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)
    assert status(mount)["server_pid"] != pid


def is_locked(path: Path, lock: Callable[[int], object]) -> bool:
    """Whether another process is refused the lock."""
    child = os.fork()
    if child == 0:
        with opened(path, os.O_RDWR) as fd:
            os._exit(errno_of(lambda: lock(fd)) in ("EAGAIN", "EACCES"))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_lower_files(mount: BasefsMount) -> None:
    """[S1250] A lower file that is open when the server is killed is read, written, truncated and synced on through the
    same descriptor, also when it has no name any more.

    [S1251] The file position, O_APPEND, flock and POSIX locks, and mappings of an open file are the same after a kill.
    """
    base = mount.mountpoint
    (base / "plain").write_bytes(bytes(range(100)))
    (base / "gone").write_bytes(b"a" * 8192)
    (base / "log").write_bytes(b"first\n")
    with ExitStack() as stack:
        plain, gone = (stack.enter_context(opened(base / name, os.O_RDWR)) for name in ("plain", "gone"))
        log = stack.enter_context(opened(base / "log", os.O_WRONLY | os.O_APPEND))
        new = stack.enter_context(opened(base / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL))
        many = [stack.enter_context(opened(base / "plain")) for _ in range(300)]
        mapping = stack.enter_context(mmap.mmap(gone, 8192))
        os.unlink(base / "gone")
        os.lseek(plain, 40, os.SEEK_SET)
        fcntl.flock(plain, fcntl.LOCK_EX)
        fcntl.lockf(log, fcntl.LOCK_EX)
        numbers = [os.fstat(fd).st_ino for fd in (plain, gone, log, new)]
        for round_number in range(2):
            kill_server(mount)
            assert [os.fstat(fd).st_ino for fd in (plain, gone, log, new)] == numbers
            assert os.read(plain, 5) == bytes(range(40 + 5 * round_number, 45 + 5 * round_number))
            assert is_locked(base / "plain", lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
            assert is_locked(base / "log", lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
            assert os.fstat(gone).st_nlink == 0
            assert os.pwrite(gone, b"b%d" % round_number, 4096) == 2
            os.fsync(gone)
            assert bytes(mapping[4096:4098]) == b"b%d" % round_number
            mapping[0:1] = b"%d" % round_number
            mapping.flush()
            assert os.pread(gone, 1, 0) == b"%d" % round_number
            os.write(log, b"more\n")
            os.write(new, b"new")
            os.fdatasync(new)
            os.ftruncate(gone, 8192)
            assert {os.pread(fd, 3, 7) for fd in many} == {bytes([7, 8, 9])}
        assert (base / "log").read_bytes() == b"first\n" + b"more\n" * 2
        assert (base / "new").read_bytes() == b"new" * 2
        assert errno_of(lambda: os.write(many[0], b"x")) == "EBADF"
    kill_server(mount)
    assert not (base / "gone").exists()
    (base / "plain").unlink()


def test_listings_and_reports(mount: BasefsMount, front: MisbehavingFront) -> None:
    """[S1252] A listing that is under way when the server is killed shows each name that stays, once.

    [S1253] An open file of `.basefs` reads the same to its end when the server is killed meanwhile.
    """
    directory = mount.mountpoint / "many"
    directory.mkdir()
    wanted = {f"{number:03}-{'x' * 200}" for number in range(600)}
    for name in wanted:
        (directory / name).touch()
    shown = []
    with os.scandir(directory) as entries:
        shown += [next(entries).name for _ in range(10)]
        kill_server(mount)
        shown += [entry.name for entry in entries]
    assert sorted(shown) == sorted(wanted)

    with opened(mount.mountpoint / ".basefs" / "status.json") as fd:
        whole = os.pread(fd, 1 << 20, 0)
        kill_server(mount)
        front.glance.add(DATA)
        wait_for_images(mount, 1)
        assert os.pread(fd, 1 << 20, 0) == whole
    assert json.loads(whole)["images"] == 0


def test_images(mount: BasefsMount, front: MisbehavingFront) -> None:
    """[S1254] Every change of an image's times, owner or mode, its unlinking and its first use are kept whenever the
    server is killed after the call.

    [S1255] An image that was unlinked while open keeps its bytes here over kills until the last close, which drops
    them; handles from before a kill count like those from after it.
    """
    first, second = (front.glance.add(DATA) for _ in range(2))
    wait_for_images(mount, 2)
    path, other = mount.path(first), mount.path(second)
    for number in range(2):
        os.utime(path, ns=(OLD_NS, OLD_NS + number))
        os.chown(path, 10 + number, 20)
        os.chmod(path, 0o640 + number)
        kill_server(mount)
        found = path.stat()
        kept = (found.st_atime_ns, found.st_mtime_ns, found.st_uid, found.st_gid, found.st_mode & 0o777)
        assert kept == (OLD_NS, OLD_NS + number, 10 + number, 20, 0o640 + number)
    with ExitStack() as stack:
        before = stack.enter_context(opened(other))
        kill_server(mount)
        assert report(mount, second)["state"] == "partial", "it was used"
        assert report(mount, second)["open_handles"] == 1
        assert os.pread(before, 4096, OFFSET) == DATA[OFFSET:][:4096]
        other.unlink()
        with opened(path) as fd:
            assert os.pread(fd, 10, 0) == DATA[:10]
        kill_server(mount)
        assert report(mount, second)["open_handles"] == 1
        assert report(mount, second)["cached_bytes"] > 0
        front.glance.delete(second)
        assert os.pread(before, 4096, OFFSET) == DATA[OFFSET:][:4096]
    eventually(lambda: report(mount, first)["open_handles"] == 0)
    chunks = mount.cache_dir / "chunks"
    eventually(lambda: len(list(chunks.glob("*.data"))) == 1)


def test_a_cache_disk_that_fails(
    front: MisbehavingFront,
    basefs_mount: Callable[..., BasefsMount],
    expected_warnings: ExpectedWarnings,
    tmp_path: Path,
) -> None:
    """[S1256] A server that is started while the cache disk fails or hangs shows every name, number and attribute as
    before, takes changes, and has them on the disk once it heals.
    """
    expected_warnings(r"died \(signal SIGKILL\)")
    expected_warnings("state of images cannot be stored on the disk")
    # The next server goes on with what nova's pre-cache call asked for, and reads the disk for that.
    expected_warnings("round the cache|lock file|cache directory was not tidied|cached chunks from byte")
    image_id = front.glance.add(DATA)
    with FaultFs(backing=tmp_path / "disk", path=tmp_path / "cache") as disk:
        mount = basefs_mount(front.conf_lines(), {"cache_dir": disk.path})
        wait_for_images(mount, 1)
        path = mount.path(image_id)
        os.utime(path, ns=(OLD_NS, OLD_NS))
        eventually(lambda: report(mount, image_id)["cached_bytes"] == len(DATA))
        number, mtime_ns = path.stat().st_ino, OLD_NS
        everything = ["read", "write", "open", "create", "truncate", "fsync"]
        rule = disk.fail("EIO", ops=everything)
        for _ in range(2):
            kill_server(mount)
            found = path.stat()
            assert (found.st_ino, found.st_mtime_ns) == (number, mtime_ns)
            mtime_ns += 1
            os.utime(path, ns=(mtime_ns, mtime_ns))
        disk.lift(rule)
        eventually(lambda: mount.log_text.count(HEALED) == 1, 60)
        # What waits for a disk that hangs cannot be killed either, so only the next server meets it.
        rule = disk.hang(ops=["open", "read"], names="state.sqlite*")
        kill_server(mount)
        found = path.stat()
        assert (found.st_ino, found.st_mtime_ns) == (number, mtime_ns)
        os.utime(path, ns=(OLD_NS, OLD_NS))
        disk.lift(rule)
        eventually(lambda: mount.log_text.count(HEALED) == 2, 60)
        kill_server(mount)
        assert path.stat().st_mtime_ns == OLD_NS
        mount.stop()


def touch_new(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


CHANGES: tuple[tuple[Callable[..., None], *tuple[str, ...]], ...] = (
    (os.mkdir, "d"),
    (os.rename, "d", "e"),
    (touch_new, "f"),
    (os.link, "f", "g"),
    (os.unlink, "f"),
    (os.unlink, "g"),
    (os.rmdir, "e"),
)


def make_directories(above: Path, wanted: int) -> None:
    """Make some and use them, until one has this inode number: ext4 gives it at once, unless others make files now."""
    above.mkdir()
    for number in range(100):
        here = above / str(number)
        here.mkdir()
        touch_new(here / "file")
        assert os.listdir(here) == ["file"]
        if here.stat().st_ino == wanted:
            break


def test_changes_under_an_upgrade(front: MisbehavingFront, basefs_mount: Callable[..., BasefsMount]) -> None:
    """[S1257] An upgrade does nothing twice and loses nothing: no call that changes the lower directory fails by it.

    [S1258] What is made after an upgrade or a kill is new to everybody, also where it got the inode number of a file or
    directory that was removed and is still in use.
    """
    mount = basefs_mount(front.conf_lines())
    stop = threading.Event()
    failures: list[str] = []
    rounds = [0, 0, 0]

    def change(number: int) -> None:
        here = mount.mountpoint / f"worker{number}"
        here.mkdir()
        while not stop.is_set():
            for call, *names in CHANGES:
                try:
                    call(*(here / name for name in names))
                except OSError as error:
                    failures.append(f"{call.__name__}: {error!r} with {os.listdir(here)}")
                    return
            rounds[number] += 1

    (mount.mountpoint / "removed").mkdir()
    with opened(mount.mountpoint / "removed", os.O_RDONLY | os.O_DIRECTORY) as removed:
        removed_ino = os.fstat(removed).st_ino
        os.rmdir(mount.mountpoint / "removed")
        workers = [threading.Thread(target=change, args=(number,)) for number in range(len(rounds))]
        mount.cli("upgrade")
        make_directories(mount.mountpoint / "new", removed_ino)
        for worker in workers:
            worker.start()
        try:
            for _ in range(2):
                before = list(rounds)
                mount.cli("upgrade")
                eventually(lambda before=before: failures or all(map(int.__gt__, rounds, before)))
        finally:
            stop.set()
            for worker in workers:
                worker.join()
    assert failures == []

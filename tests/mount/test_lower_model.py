"""Random operations on the mount and on a plain directory: every answer is the same, and so is what is left."""

import ctypes
import errno
import itertools
import mmap
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.mount.lower_mount import LowerMount

pytestmark = pytest.mark.mount

NAMES = ("a", "b", "c", "d", "d/a", "d/b", "e", "e/d")
# O_NONBLOCK, so that opening a FIFO does not wait for its other end.
ACCESS = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
EXTRA_FLAGS = (os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_SYNC, os.O_NOFOLLOW)
OPEN_FILES_MAX = 4

names = st.sampled_from(NAMES)
sizes = st.one_of(st.integers(0, 10_000), st.sampled_from((0, 4096, 131_072, 1 << 20, (1 << 40) + 1)))
offsets = st.one_of(st.integers(0, 20_000), st.sampled_from((4095, 4096, 131_071, 131_072, 1 << 20)))
contents = st.one_of(st.binary(max_size=40), st.integers(0, 300_000).map(lambda size: (b"basefs." * 50_000)[:size]))
modes = st.integers(0, 0o1777)
times = st.integers(-(2**31) * 10**9, 2**33 * 10**9)
extra_flags = st.sampled_from(EXTRA_FLAGS)
slots = st.one_of(st.integers(0, OPEN_FILES_MAX - 1), st.integers(0, 1))
xattr_names = st.sampled_from(("user.a", "user.b", "trusted.c"))

_libc = ctypes.CDLL(None, use_errno=True)


def rename_flags(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or its errno by name."""
    try:
        return call()
    except OSError as exc:
        return errno.errorcode[exc.errno]


def shape(status: os.stat_result) -> tuple[Any, ...]:
    """What two files made by the same operations have in common."""
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return (oct(status.st_mode), status.st_nlink, status.st_uid, status.st_gid, size, status.st_rdev)


def snapshot(root: Path) -> dict[str, Any]:
    """Everything a directory tree holds."""
    found: dict[str, Any] = {}
    for directory, subdirectories, files in os.walk(root):
        for name in subdirectories + files:
            path = Path(directory) / name
            status = os.lstat(path)
            content: Any = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = outcome(lambda path=path: read_sparse(path))
            attributes = {key: os.getxattr(path, key, follow_symlinks=False) for key in sorted(listxattr(path))}
            found[str(path.relative_to(root))] = (shape(status), content, attributes)
    return found


def read_sparse(path: Path) -> tuple[bytes, bytes]:
    """The first 2 MiB and the last 100 bytes."""
    with open(path, "rb") as file:
        head = file.read(2 << 20)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 100))
        return head, file.read()


def listxattr(path: Path) -> list[str]:
    return sorted(os.listxattr(path, follow_symlinks=False))


class LowerModel(RuleBasedStateMachine):
    """Each rule does one thing on `mounted` and on `plain`."""

    mount: LowerMount
    plain_root: Path
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        name = f"run{next(self.numbers)}"
        self.mounted, self.plain = self.mount.path / name, self.plain_root / name
        self.mounted.mkdir()
        self.plain.mkdir()
        self.files: dict[int, tuple[int, int]] = {}
        # Something to work on, or most operations would fail.
        self.same(lambda root: [os.mkdir(root / name) for name in ("d", "e")])
        self.same(lambda root: [(root / name).write_bytes(b"begin" * 3000) for name in ("a", "b", "d/a")])
        self.keep_open(0, "a", os.O_RDWR, 0)
        self.keep_open(1, "b", os.O_RDWR | os.O_APPEND, 0)

    def same(self, call: Callable[[Path], Any]) -> Any:
        """`call` gives the same in both directories."""
        on_mount, on_plain = outcome(lambda: call(self.mounted)), outcome(lambda: call(self.plain))
        assert on_mount == on_plain
        return on_mount

    def same_on_file(self, slot: int, call: Callable[[int], Any]) -> Any:
        """`call` gives the same on both fds of an open file."""
        if slot in self.files:
            on_mount, on_plain = (outcome(lambda fd=fd: call(fd)) for fd in self.files[slot])
            assert on_mount == on_plain
            return on_mount
        return None

    def teardown(self) -> None:
        for slot in list(self.files):
            self.close(slot)
        self.same(snapshot)
        beneath = self.mount.beneath / self.mounted.name
        assert snapshot(beneath) == snapshot(self.mounted)
        shutil.rmtree(self.mounted)
        shutil.rmtree(self.plain)
        assert not beneath.exists()

    # --- names

    @rule(name=names, mode=modes)
    def mkdir(self, name, mode):
        self.same(lambda root: os.mkdir(root / name, mode))

    @rule(name=names)
    def rmdir(self, name):
        self.same(lambda root: os.rmdir(root / name))

    @rule(name=names)
    def unlink(self, name):
        self.same(lambda root: os.unlink(root / name))

    @rule(name=names, goal=st.sampled_from((*NAMES, "../d/b", "nowhere", "x" * 3000)))
    def symlink(self, name, goal):
        self.same(lambda root: os.symlink(goal, root / name))

    @rule(name=names)
    def readlink(self, name):
        self.same(lambda root: os.readlink(root / name))

    @rule(name=names, mode=modes, kind=st.sampled_from((stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)))
    def mknod(self, name, mode, kind):
        self.same(lambda root: os.mknod(root / name, kind | mode))

    @rule(old=names, new=names)
    def link(self, old, new):
        self.same(lambda root: os.link(root / old, root / new, follow_symlinks=False))

    @rule(old=names, new=names, flags=st.sampled_from((0, 0, 0, 1, 2, 3)))
    def rename(self, old, new, flags):
        self.same(lambda root: rename_flags(root / old, root / new, flags))

    @rule(name=names)
    def listdir(self, name):
        self.same(lambda root: (sorted(os.listdir(root)), sorted(os.listdir(root / name))))

    # --- attributes

    @rule(name=names, mode=modes)
    def chmod(self, name, mode):
        self.same(lambda root: os.chmod(root / name, mode))

    @rule(name=names, uid=st.integers(-1, 3), gid=st.integers(-1, 3))
    def chown(self, name, uid, gid):
        self.same(lambda root: os.lchown(root / name, uid, gid))

    @rule(name=names, atime=times, mtime=times)
    def utime(self, name, atime, mtime):
        def set_and_get(root: Path) -> tuple[int, int]:
            os.utime(root / name, ns=(atime, mtime), follow_symlinks=False)
            status = os.lstat(root / name)
            return status.st_atime_ns, status.st_mtime_ns

        self.same(set_and_get)

    @rule(name=names, size=sizes)
    def truncate(self, name, size):
        self.same(lambda root: os.truncate(root / name, size))

    @rule(name=names)
    def stat(self, name):
        self.same(lambda root: (shape(os.lstat(root / name)), shape(os.stat(root / name))))

    @rule(name=names, key=xattr_names, value=st.binary(max_size=60), flags=st.sampled_from((0, 0, 1, 2)))
    def setxattr(self, name, key, value, flags):
        self.same(lambda root: os.setxattr(root / name, key, value, flags, follow_symlinks=False))

    @rule(name=names, key=xattr_names)
    def removexattr(self, name, key):
        self.same(lambda root: os.removexattr(root / name, key, follow_symlinks=False))

    @rule(name=names, key=xattr_names)
    def getxattr(self, name, key):
        self.same(lambda root: (listxattr(root / name), os.getxattr(root / name, key, follow_symlinks=False)))

    # --- open files

    @rule(
        slot=slots, name=names, access=st.sampled_from(ACCESS), extra=st.sets(st.sampled_from(EXTRA_FLAGS)), mode=modes
    )
    def open(self, slot, name, access, extra, mode):
        flags = access | os.O_NONBLOCK
        for flag in extra:
            flags |= flag
        self.keep_open(slot, name, flags, mode)

    def keep_open(self, slot: int, name: str, flags: int, mode: int) -> None:
        if slot in self.files:
            self.close(slot)
        got = [outcome(lambda root=root: os.open(root / name, flags, mode)) for root in (self.mounted, self.plain)]
        if all(isinstance(fd, int) for fd in got):
            self.files[slot] = (got[0], got[1])
        else:
            assert got[0] == got[1]

    @rule(slot=slots)
    def close(self, slot):
        self.same_on_file(slot, os.close)
        self.files.pop(slot, None)

    @rule(slot=slots, data=contents, offset=offsets)
    def pwrite(self, slot, data, offset):
        self.same_on_file(slot, lambda fd: os.pwrite(fd, data, offset))

    @rule(slot=slots, data=contents)
    def write(self, slot, data):
        self.same_on_file(slot, lambda fd: os.write(fd, data))

    @rule(slot=slots, size=sizes.filter(lambda size: size < 1 << 30), offset=offsets)
    def pread(self, slot, size, offset):
        self.same_on_file(slot, lambda fd: os.pread(fd, size, offset))

    @rule(slot=slots, size=sizes)
    def ftruncate(self, slot, size):
        self.same_on_file(slot, lambda fd: os.ftruncate(fd, size))

    @rule(slot=slots, mode=modes)
    def fchmod(self, slot, mode):
        self.same_on_file(slot, lambda fd: (os.fchmod(fd, mode), shape(os.fstat(fd))))

    @rule(slot=slots)
    def fstat(self, slot):
        self.same_on_file(slot, lambda fd: shape(os.fstat(fd)))

    @rule(slot=slots, sync=st.sampled_from((os.fsync, os.fdatasync)))
    def fsync(self, slot, sync):
        if slot in self.files and stat.S_ISREG(os.fstat(self.files[slot][0]).st_mode):
            self.same_on_file(slot, sync)

    @rule(source=slots, sink=slots, size=st.integers(0, 200_000), offset=offsets)
    def copy_file_range(self, source, sink, size, offset):
        if source in self.files and sink in self.files and source != sink:
            pairs = zip(self.files[source], self.files[sink], strict=True)
            got = [outcome(lambda a=a, b=b: os.copy_file_range(a, b, size, offset, offset // 2)) for a, b in pairs]
            assert got[0] == got[1]

    @rule(source=slots, sink=slots, size=st.integers(1, 200_000), offset=offsets)
    def sendfile(self, source, sink, size, offset):
        if source in self.files and sink in self.files and source != sink:
            pairs = zip(self.files[source], self.files[sink], strict=True)
            got = [outcome(lambda a=a, b=b: os.sendfile(b, a, offset, size)) for a, b in pairs]
            assert got[0] == got[1]

    @rule(slot=slots, data=st.binary(min_size=1, max_size=30), offset=st.integers(0, 10_000))
    def write_by_mmap(self, slot, data, offset):
        def change(fd: int) -> bytes:
            if os.fstat(fd).st_size < offset + len(data):
                return b"too short"
            with mmap.mmap(fd, offset + len(data)) as view:
                before = view[:]
                view[offset:] = data
                return before

        if slot in self.files and stat.S_ISREG(os.fstat(self.files[slot][0]).st_mode):
            self.same_on_file(slot, change)

    @invariant()
    def names_are_the_same(self):
        self.same(lambda root: sorted(os.listdir(root)))


@pytest.fixture
def model(tmp_path: Path) -> Iterator[type[LowerModel]]:
    plain = tmp_path / "plain"
    plain.mkdir()
    with LowerMount(tmp_path / "mount") as mount:

        class Model(LowerModel):
            pass

        Model.mount, Model.plain_root = mount, plain
        yield Model
        assert mount.forget_all() == [0, 0, 0]


def test_mount_does_what_a_plain_directory_does(model: type[LowerModel]) -> None:
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=40,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )

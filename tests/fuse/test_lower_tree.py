"""LowerTree called directly, without a mount."""

import errno
import os
import stat
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.concurrency.threads import BlockingCalls
from basefs.fuse import lower, lower_disk, lower_holding, lower_xattrs
from basefs.fuse.lower import LowerTree
from tests.fakes.escrow import MemoryEscrow

ROOT = 1
FIRST_HANDLE = 1 << 62
ROOT_USER = SimpleNamespace(uid=0, gid=0, umask=0o022, pid=1)
USER = SimpleNamespace(uid=1234, gid=2345, umask=0o027, pid=1)
NO_ID = 0xFFFFFFFF


def _never(fd: int) -> bool:
    return False


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def fields(**values: object) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The two arguments of a SETATTR: values, and which of them are meant."""
    names = {"uid": "uid", "gid": "gid", "mode": "mode", "size": "size", "atime_ns": "atime", "mtime_ns": "mtime"}
    attributes = SimpleNamespace(**{f"st_{name}": values.get(name, 0) for name in names})
    return attributes, SimpleNamespace(**{f"update_{field}": name in values for name, field in names.items()})


@asynccontextmanager
async def tree_over(
    directory: Path, threads_max: int = 8, escrow: MemoryEscrow | None = None
) -> AsyncIterator[LowerTree]:
    """A tree whose every fd is closed at the end; it goes on with what is in `escrow`."""
    root_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    own = MemoryEscrow()
    escrow = own if escrow is None else escrow
    tree = LowerTree(root_fd, BlockingCalls("lower", threads_max=threads_max), escrow, first_handle=FIRST_HANDLE)
    os.close(root_fd)
    try:
        await tree.restore(escrow.held())
        yield tree
    finally:
        await tree.close()
        own.close()


@pytest.fixture(params=["local", "remote"])
async def tree(request: pytest.FixtureRequest, lower_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator:
    """Over a file system whose status is in memory, and over one where it is not (as NFS)."""
    if request.param == "remote":
        monkeypatch.setattr(lower, "stays_in_memory", _never)
    before = open_fds()
    async with tree_over(lower_dir) as made:
        yield made
    assert open_fds() == before


@pytest.fixture
def lower_dir(tmp_path: Path) -> Path:
    path = tmp_path / "lower"
    path.mkdir()
    return path


async def inode_of(tree: LowerTree, name: bytes, parent: int = ROOT) -> int:
    entry = await tree.lookup(parent, name)
    assert entry is not None
    return entry.st_ino


# --- lookups and counts


async def test_absent_name_is_none_and_counts_nothing(tree: LowerTree) -> None:
    assert await tree.lookup(ROOT, b"none") is None
    assert (tree.known_inodes, tree.lookups) == (0, 0)


async def test_entry_has_the_attributes_of_the_lower_file(tree: LowerTree, lower_dir: Path) -> None:
    path = lower_dir / "file"
    path.write_bytes(b"x" * 5000)
    os.chmod(path, 0o641)
    os.chown(path, 7, 8)
    os.utime(path, ns=(-1_500_000_001, 1_700_000_000_123_456_789))
    found, status = await tree.lookup(ROOT, b"file"), os.stat(path)
    assert found.st_ino == 1 << 63 | status.st_ino
    for name in ("mode", "nlink", "uid", "gid", "size", "blocks", "atime_ns", "mtime_ns", "ctime_ns", "rdev"):
        assert getattr(found, f"st_{name}") == getattr(status, f"st_{name}"), name
    assert found.st_blksize == 128 * 1024
    assert (found.entry_timeout, found.attr_timeout) == (1.0, 1.0)


async def test_root_is_inode_1_and_never_forgotten(tree: LowerTree) -> None:
    await tree.forget([(ROOT, 5)])
    assert (await tree.getattr(ROOT)).st_ino == 1


async def test_inode_is_known_until_forgotten_as_often_as_looked_up(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "a").touch()
    os.link(lower_dir / "a", lower_dir / "b")
    inode = await inode_of(tree, b"a")
    assert await inode_of(tree, b"b") == inode
    await inode_of(tree, b"a")
    assert (tree.known_inodes, tree.lookups) == (1, 3)
    await tree.forget([(inode, 2)])
    assert (tree.known_inodes, tree.lookups) == (1, 1)
    await tree.forget([(inode, 1)])
    assert (tree.known_inodes, tree.lookups) == (0, 0)


async def test_forgetting_an_unknown_inode_does_nothing(tree: LowerTree) -> None:
    await tree.forget([(1 << 63 | 12345, 1), (2, 1), (1 << 32, 7)])
    assert tree.known_inodes == 0


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc", b"../x", b"a\0b"])
async def test_name_that_is_no_entry_is_refused(tree: LowerTree, lower_dir: Path, name: bytes) -> None:
    (lower_dir / "a").mkdir()
    (lower_dir / "a" / "b").touch()
    assert await tree.lookup(ROOT, name) is None
    for call in (
        tree.mkdir(ROOT, name, 0o755, ROOT_USER),
        tree.create(ROOT, name, 0o644, os.O_RDWR, ROOT_USER),
        tree.mknod(ROOT, name, stat.S_IFIFO | 0o644, 0, ROOT_USER),
        tree.symlink(ROOT, name, b"t", ROOT_USER),
        tree.unlink(ROOT, name),
        tree.rmdir(ROOT, name),
        tree.rename(ROOT, name, ROOT, b"new", 0),
        tree.rename(ROOT, b"a", ROOT, name, 0),
        tree.link(ROOT, ROOT, name),
    ):
        with pytest.raises(errors.NoSuchEntryError):
            await call
    assert sorted(os.listdir(lower_dir)) == ["a"]
    assert os.listdir(lower_dir / "a") == ["b"]


async def test_symlink_is_never_followed(tree: LowerTree, lower_dir: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    os.symlink(outside, lower_dir / "dir")
    os.symlink(outside / "secret", lower_dir / "file")
    inode = await inode_of(tree, b"dir")
    assert stat.S_ISLNK((await tree.getattr(inode)).st_mode)
    for call in (tree.lookup(inode, b"secret"), tree.list_names(inode), tree.mkdir(inode, b"x", 0o755, ROOT_USER)):
        with pytest.raises(errors.LowerFileError) as caught:
            await call
        assert caught.value.os_error.errno == errno.ENOTDIR
    with pytest.raises(errors.LowerFileError):
        await tree.open(await inode_of(tree, b"file"), os.O_RDONLY)
    with pytest.raises(errors.LowerFileError) as caught:
        await tree.create(ROOT, b"file", 0o644, os.O_WRONLY | os.O_TRUNC, ROOT_USER)
    assert caught.value.os_error.errno == errno.ESTALE
    await tree.setattr(inode, *fields(uid=5, gid=6, mtime_ns=77), None, ROOT_USER)
    status = os.lstat(lower_dir / "dir")
    assert (status.st_uid, status.st_gid, status.st_mtime_ns) == (5, 6, 77)
    assert os.stat(outside).st_uid == 0
    assert os.listdir(outside) == ["secret"]
    assert await tree.readlink(inode) == bytes(outside)
    os.symlink("../outside", lower_dir / "relative")
    assert stat.S_ISLNK((await tree.getattr(await inode_of(tree, b"relative"))).st_mode)


async def test_name_too_long_is_the_lower_file_systems_error(tree: LowerTree) -> None:
    with pytest.raises(errors.LowerFileError) as caught:
        await tree.lookup(ROOT, b"n" * 300)
    assert caught.value.os_error.errno == errno.ENAMETOOLONG


def _refuse(name: bytes, entry: object, next_id: int) -> bool:
    pytest.fail(f"{name!r} was told")


@pytest.fixture
def mounted_below(lower_dir: Path) -> Iterator[Path]:
    path = lower_dir / "other"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    (path / "inside").touch()
    yield path
    subprocess.run(["umount", path], check=True)


async def test_file_system_mounted_below_is_not_shown(tree: LowerTree, mounted_below: Path) -> None:
    with pytest.raises(errors.LowerFileError) as caught:
        await tree.lookup(ROOT, b"other")
    assert caught.value.os_error.errno == errno.EXDEV
    assert await tree.reply_names(ROOT, [(1, b"other")], _refuse)
    with pytest.raises(errors.NoSuchEntryError):
        await tree.getattr(1 << 63 | os.stat(mounted_below / "inside").st_ino)


# --- after a restart of the server


async def test_inode_of_the_server_before_is_found_again(lower_dir: Path) -> None:
    (lower_dir / "top").write_bytes(b"top")
    deep = lower_dir / "d" / "e" / "f"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    async with tree_over(lower_dir) as before:
        top = await inode_of(before, b"top")
        inode = ROOT
        for name in (b"d", b"e", b"f", b"file"):
            inode = await inode_of(before, name, inode)
    async with tree_over(lower_dir) as after:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(after.getattr, inode)
        handle = await after.open(inode, os.O_RDONLY)
        assert bytes(await after.read(handle, 0, 10)) == b"deep"
        assert (await after.getattr(top)).st_size == 3
        assert (after.known_inodes, after.lookups) == (2, 0)
        await after.release(handle)
        # The kernel forgets with the counts of both servers' lives.
        await after.forget([(inode, 3), (top, 1)])
        assert after.known_inodes == 0


async def test_one_search_serves_all_who_ask_for_an_inode(lower_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lower_dir / "file").touch()
    inode = 1 << 63 | os.stat(lower_dir / "file").st_ino
    searches: list[int] = []

    def count(root_fd: int, st_ino: int, entries_max: int) -> lower_disk.Found:
        searches.append(st_ino)
        return lower_disk.find_inode(root_fd, st_ino, entries_max)

    monkeypatch.setattr(lower_holding, "find_inode", count)
    async with tree_over(lower_dir) as tree:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(tree.getattr, inode)
    assert len(searches) == 1


async def test_inode_that_is_gone_is_not_found_again(lower_dir: Path) -> None:
    (lower_dir / "file").touch()
    inode = 1 << 63 | os.stat(lower_dir / "file").st_ino
    os.rename(lower_dir / "file", lower_dir.parent / "elsewhere")
    async with tree_over(lower_dir) as tree:
        for number in (inode, 2, 1 << 32, 1 << 63):
            with pytest.raises(errors.NoSuchEntryError):
                await tree.getattr(number)


async def test_an_inode_is_found_again_beside_directories_that_vanish_meanwhile(
    lower_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lower_dir / "file").touch()
    entries = lower_disk._entries
    monkeypatch.setattr(lower_disk, "_entries", lambda fd: [("gone", 7, True), *entries(fd)])
    async with tree_over(lower_dir) as tree:
        assert (await tree.getattr(1 << 63 | os.stat(lower_dir / "file").st_ino)).st_size == 0


def test_search_for_an_inode_is_bounded(lower_dir: Path) -> None:
    for number in range(30):
        (lower_dir / f"d{number}").mkdir()
    (lower_dir / "d7" / "file").touch()
    st_ino = os.stat(lower_dir / "d7" / "file").st_ino
    before = open_fds()
    root_fd = os.open(lower_dir, os.O_PATH)
    with pytest.raises(FileNotFoundError):
        lower_disk.find_inode(root_fd, st_ino, entries_max=30)
    fd, status = lower_disk.find_inode(root_fd, st_ino, entries_max=100)
    assert status.st_ino == st_ino
    os.close(fd)
    os.close(root_fd)
    assert open_fds() == before


# --- making and removing


async def test_new_files_belong_to_the_caller_and_lose_the_umask(tree: LowerTree, lower_dir: Path) -> None:
    handle, entry = await tree.create(ROOT, b"file", 0o666, os.O_WRONLY | os.O_CREAT, USER)
    await tree.release(handle)
    assert (entry.st_uid, entry.st_gid, stat.S_IMODE(entry.st_mode)) == (1234, 2345, 0o640)
    await tree.mkdir(ROOT, b"dir", stat.S_IFDIR | 0o777, USER)
    await tree.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o666, 0, USER)
    await tree.mknod(ROOT, b"plain", stat.S_IFREG | 0o666, 0, USER)
    await tree.mknod(ROOT, b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3), USER)
    await tree.symlink(ROOT, b"link", b"to/where", USER)
    modes = {"file": 0o100640, "dir": 0o40750, "fifo": 0o10640, "plain": 0o100640, "null": 0o20640, "link": 0o120777}
    for name, mode in modes.items():
        status = os.lstat(lower_dir / name)
        assert (status.st_uid, status.st_gid, oct(status.st_mode)) == (1234, 2345, oct(mode)), name
    assert os.stat(lower_dir / "null").st_rdev == os.makedev(1, 3)
    assert tree.known_inodes == len(modes)


async def test_setgid_directory_hands_down_its_group(tree: LowerTree, lower_dir: Path) -> None:
    os.chown(lower_dir, 0, 4321)
    os.chmod(lower_dir, 0o2775)
    handle, entry = await tree.create(ROOT, b"file", 0o664, os.O_WRONLY, USER)
    await tree.release(handle)
    assert (entry.st_uid, entry.st_gid, oct(entry.st_mode)) == (1234, 4321, "0o100640")
    entry = await tree.mkdir(ROOT, b"dir", stat.S_IFDIR | 0o777, USER)
    assert (entry.st_uid, entry.st_gid, oct(entry.st_mode)) == (1234, 4321, "0o42750")


async def test_create_works_whatever_the_umask_of_the_server(tree: LowerTree) -> None:
    old = os.umask(0o077)
    try:
        handle, entry = await tree.create(ROOT, b"file", 0o666, os.O_WRONLY, ROOT_USER)
        made = await tree.mkdir(ROOT, b"dir", 0o777, ROOT_USER)
    finally:
        os.umask(old)
    await tree.release(handle)
    assert (stat.S_IMODE(entry.st_mode), stat.S_IMODE(made.st_mode)) == (0o644, 0o755)


async def test_create_of_a_name_that_exists(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").write_bytes(b"keep")
    for flags, expected in ((os.O_EXCL, errno.EEXIST), (os.O_TRUNC, errno.ESTALE)):
        with pytest.raises(errors.LowerFileError) as caught:
            await tree.create(ROOT, b"file", 0o644, os.O_CREAT | os.O_WRONLY | flags, USER)
        assert caught.value.os_error.errno == expected
    assert (lower_dir / "file").read_bytes() == b"keep"
    assert (tree.open_files, tree.known_inodes) == (0, 0)


@pytest.mark.parametrize("failing", ["chown", "chmod"])
async def test_what_cannot_be_handed_over_is_not_left_behind(
    tree: LowerTree, lower_dir: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, failing, refuse)
    mode = 0o644
    before = open_fds()
    old_umask = os.umask(0o777)  # so that chmod is needed
    try:
        for call in (
            tree.create(ROOT, b"file", mode, os.O_WRONLY, USER),
            tree.mkdir(ROOT, b"dir", mode, USER),
            tree.mknod(ROOT, b"fifo", stat.S_IFIFO | mode, 0, USER),
            *([tree.symlink(ROOT, b"link", b"t", USER)] if failing == "chown" else []),
        ):
            with pytest.raises(errors.LowerFileError):
                await call
    finally:
        os.umask(old_umask)
    assert os.listdir(lower_dir) == []
    assert open_fds() == before
    assert (tree.open_files, tree.known_inodes) == (0, 0)


async def test_link_counts_as_a_lookup(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "a").touch()
    os.symlink("x", lower_dir / "s")
    inode = await inode_of(tree, b"a")
    assert (await tree.link(inode, ROOT, b"b")).st_nlink == 2
    link = await inode_of(tree, b"s")
    assert (await tree.link(link, ROOT, b"s2")).st_ino == link
    assert os.readlink(lower_dir / "s2") == "x"
    assert tree.lookups == 4
    await tree.forget([(inode, 2), (link, 2)])
    assert tree.known_inodes == 0


async def test_rename_flags_reach_the_lower_file_system(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "a").write_bytes(b"a")
    (lower_dir / "b").write_bytes(b"b")
    with pytest.raises(errors.LowerFileError) as caught:
        await tree.rename(ROOT, b"a", ROOT, b"b", 1)
    assert caught.value.os_error.errno == errno.EEXIST
    await tree.rename(ROOT, b"a", ROOT, b"b", 2)
    assert ((lower_dir / "a").read_bytes(), (lower_dir / "b").read_bytes()) == (b"b", b"a")
    await tree.rename(ROOT, b"a", ROOT, b"b", 0)
    assert (lower_dir / "b").read_bytes() == b"b"
    with pytest.raises(errors.NoSuchEntryError):
        await tree.rename(ROOT, b"a", ROOT, b"b", 0)


# --- listing


async def test_listing_is_told_with_counts_and_stops_when_the_buffer_is_full(tree: LowerTree, lower_dir: Path) -> None:
    for number in range(200):
        (lower_dir / f"f{number}").touch()
    names = list(enumerate(await tree.list_names(ROOT), start=1))
    assert sorted(name for _, name in names) == sorted(os.fsencode(f"f{number}") for number in range(200))
    os.unlink(lower_dir / "f7")
    told: list[tuple[bytes, int]] = []
    refused: list[int] = []

    def reply(name: bytes, entry: object, next_id: int) -> bool:
        if len(told) in (100, 150) and len(told) not in refused:
            refused.append(len(told))
            return False
        told.append((name, next_id))
        return True

    position = 0
    while not await tree.reply_names(ROOT, names[position:], reply):
        position = told[-1][1]
    assert refused == [100, 150]
    assert told == [(name, next_id) for next_id, name in names if name != b"f7"]
    assert tree.known_inodes == tree.lookups == 199


async def test_listing_tells_attributes_of_the_moment(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").write_bytes(b"old")
    names = await tree.list_names(ROOT)
    (lower_dir / "file").write_bytes(b"newer")
    sizes: list[int] = []

    def reply(name: bytes, entry: SimpleNamespace, next_id: int) -> bool:
        sizes.append(entry.st_size)
        return True

    await tree.reply_names(ROOT, [(1, names[0])], reply)
    assert sizes == [5]


async def test_error_in_a_later_part_of_a_listing_comes_with_the_next_request(
    tree: LowerTree, lower_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        (lower_dir / f"f{number}").touch()
    names = list(enumerate(await tree.list_names(ROOT), start=1))
    find, calls = lower_disk.find_names, iter([True, False])

    def fails_second(parent_fd: int, batch: list[bytes]) -> object:
        if next(calls, False):
            return find(parent_fd, batch)
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(lower_disk, "find_names", fails_second)
    told: list[int] = []

    def reply(name: bytes, entry: object, next_id: int) -> bool:
        told.append(next_id)
        return True

    assert not await tree.reply_names(ROOT, names, reply)
    assert tree.lookups == len(told) > 0
    with pytest.raises(errors.LowerFileError):
        await tree.reply_names(ROOT, names[told[-1] :], reply)
    assert tree.lookups == len(told)


# --- open files


@pytest.mark.parametrize("local", [True, False])
async def test_pages_are_kept_over_opens_on_file_systems_of_this_host_only(
    lower_dir: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    monkeypatch.setattr(lower, "stays_in_memory", lambda fd: local and fd >= 0)
    async with tree_over(lower_dir) as tree:
        assert tree.may_keep_pages is local


@pytest.mark.parametrize(("path", "local"), [("/dev/shm", True), ("/proc", False)])
def test_only_file_systems_known_to_be_of_this_host_count_as_such(path: str, local: bool) -> None:
    fd = os.open(path, os.O_PATH)
    assert lower.stays_in_memory(fd) is local
    os.close(fd)


async def test_handles_count_up_from_the_first_and_are_not_used_again(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").touch()
    inode = await inode_of(tree, b"file")
    handles = []
    for _ in range(3):
        handles.append(await tree.open(inode, os.O_RDONLY))
        await tree.release(handles[-1])
    assert handles == [FIRST_HANDLE, FIRST_HANDLE + 1, FIRST_HANDLE + 2]
    for call in (
        tree.read(handles[0], 0, 1),
        tree.write(handles[0], 0, b"x"),
        tree.flush(handles[0]),
        tree.fsync(handles[0], datasync=False),
        tree.release(handles[0]),
        tree.setattr(inode, *fields(size=0), handles[0], ROOT_USER),
    ):
        with pytest.raises(errors.BadHandleError):
            await call


async def test_only_flags_that_concern_the_lower_file_reach_it(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").write_bytes(b"0123456789")
    inode = await inode_of(tree, b"file")
    flags = os.O_RDWR | os.O_APPEND | os.O_DIRECT | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NOCTTY
    handle = await tree.open(inode, flags)
    await tree.write(handle, 3, b"xyz")
    assert bytes(await tree.read(handle, 1, 7)) == b"12xyz67"
    await tree.release(handle)
    handle = await tree.open(inode, os.O_WRONLY | os.O_TRUNC)
    assert os.stat(lower_dir / "file").st_size == 0
    await tree.release(handle)


async def test_only_regular_files_are_opened(tree: LowerTree, lower_dir: Path) -> None:
    os.mkfifo(lower_dir / "fifo")
    with trio.fail_after(60), pytest.raises(errors.LowerFileError):
        await tree.open(await inode_of(tree, b"fifo"), os.O_RDONLY)


async def test_unlinked_file_stays_usable_while_the_kernel_knows_it(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").write_bytes(b"bytes")
    inode = await inode_of(tree, b"file")
    await tree.unlink(ROOT, b"file")
    assert await tree.lookup(ROOT, b"file") is None
    handle = await tree.open(inode, os.O_RDWR)
    assert bytes(await tree.read(handle, 0, 100)) == b"bytes"
    entry = await tree.setattr(inode, *fields(size=2, mode=0o600), None, ROOT_USER)
    assert (entry.st_size, entry.st_nlink, stat.S_IMODE(entry.st_mode)) == (2, 0, 0o600)
    await tree.release(handle)
    await tree.forget([(inode, 1)])
    with pytest.raises(errors.NoSuchEntryError):
        await tree.getattr(inode)


async def test_reads_are_exact_at_every_offset(tree: LowerTree, lower_dir: Path) -> None:
    data = os.urandom(300_001)
    (lower_dir / "file").write_bytes(data)
    handle = await tree.open(await inode_of(tree, b"file"), os.O_RDONLY)
    size = len(data)
    for offset, count in ((0, 1), (0, size), (4095, 4097), (size - 1, 1), (size - 1, 2), (size, 1), (size + 9, 4096)):
        assert bytes(await tree.read(handle, offset, count)) == data[offset : offset + count]
    assert bytes(await tree.read(handle, 0, 1 << 20)) == data
    await tree.release(handle)


async def test_read_of_bytes_that_are_on_the_disk_only_is_exact(tree: LowerTree, lower_dir: Path) -> None:
    data = os.urandom(3 << 20)
    fd = os.open(lower_dir / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, data)
    os.fsync(fd)
    handle = await tree.open(await inode_of(tree, b"file"), os.O_RDONLY)
    for offset in (0, 1 << 20, 100):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(fd, 1, offset)  # the first page is in memory, the rest may not be
        assert bytes(await tree.read(handle, offset, 1 << 20)) == data[offset : offset + (1 << 20)]
    os.close(fd)
    await tree.release(handle)


async def test_short_read_goes_on(tree: LowerTree, lower_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(10_000)
    (lower_dir / "file").write_bytes(data)
    handle = await tree.open(await inode_of(tree, b"file"), os.O_RDONLY)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 3000), offset))
    assert await tree.read(handle, 100, 9000) == data[100:9100]
    assert await tree.read(handle, 9000, 5000) == data[9000:]
    await tree.release(handle)


async def test_failed_read_gives_no_bytes(tree: LowerTree, lower_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lower_dir / "file").write_bytes(bytes(10_000))
    handle = await tree.open(await inode_of(tree, b"file"), os.O_RDONLY)
    pread = os.pread

    def broken(fd: int, size: int, offset: int) -> bytes:
        if offset >= 4096:
            raise OSError(errno.EIO, "bad disk")
        return pread(fd, min(size, 4096), offset)

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(errors.LowerFileError) as caught:
        await tree.read(handle, 0, 8192)
    assert caught.value.os_error.errno == errno.EIO
    monkeypatch.undo()
    await tree.release(handle)


async def test_short_write_goes_on(tree: LowerTree, lower_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, _ = await tree.create(ROOT, b"file", 0o644, os.O_WRONLY, ROOT_USER)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    data = os.urandom(5500)
    assert await tree.write(handle, 10, data) == 5500
    await tree.release(handle)
    assert (lower_dir / "file").read_bytes() == bytes(10) + data


async def test_sparse_write_stays_sparse(tree: LowerTree, lower_dir: Path) -> None:
    handle, _ = await tree.create(ROOT, b"file", 0o644, os.O_RDWR, ROOT_USER)
    await tree.write(handle, 1 << 40, b"end")
    assert bytes(await tree.read(handle, (1 << 40) - 3, 10)) == b"\0\0\0end"
    await tree.fsync(handle, datasync=True)
    await tree.fsync(handle, datasync=False)
    await tree.flush(handle)
    await tree.release(handle)
    status = os.stat(lower_dir / "file")
    assert status.st_size == (1 << 40) + 3
    assert status.st_blocks < 1000


# --- attributes


async def test_times_are_set_to_the_nanosecond_and_one_without_the_other(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").touch()
    inode = await inode_of(tree, b"file")
    entry = await tree.setattr(inode, *fields(atime_ns=1_000_000_001, mtime_ns=-5), None, ROOT_USER)
    assert (entry.st_atime_ns, entry.st_mtime_ns) == (1_000_000_001, -5)
    entry = await tree.setattr(inode, *fields(mtime_ns=1_700_000_000_999_999_999), None, ROOT_USER)
    assert (entry.st_atime_ns, entry.st_mtime_ns) == (1_000_000_001, 1_700_000_000_999_999_999)
    entry = await tree.setattr(inode, *fields(atime_ns=0), None, ROOT_USER)
    assert (entry.st_atime_ns, entry.st_mtime_ns) == (0, 1_700_000_000_999_999_999)


async def test_owner_and_group_change_alone(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").touch()
    inode = await inode_of(tree, b"file")
    entry = await tree.setattr(inode, *fields(uid=11), None, ROOT_USER)
    assert (entry.st_uid, entry.st_gid) == (11, 0)
    entry = await tree.setattr(inode, *fields(gid=12), None, ROOT_USER)
    assert (entry.st_uid, entry.st_gid) == (11, 12)


async def test_truncate_through_a_handle_and_by_name(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").write_bytes(b"0123456789")
    os.chmod(lower_dir / "file", 0o444)
    inode = await inode_of(tree, b"file")
    for flags in (os.O_RDWR, os.O_RDONLY):
        handle = await tree.open(inode, flags)
        assert (await tree.setattr(inode, *fields(size=4), handle, USER)).st_size == 4
        assert (await tree.setattr(inode, *fields(size=6), None, USER)).st_size == 6
        await tree.release(handle)
    assert (lower_dir / "file").read_bytes() == b"0123\0\0"


async def test_changing_the_bytes_takes_set_id_bits_away(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").write_bytes(b"0123456789")
    inode = await inode_of(tree, b"file")
    handle = await tree.open(inode, os.O_RDWR)

    async def write() -> None:
        await tree.write(handle, 0, b"x")

    async def truncate() -> None:
        await tree.setattr(inode, *fields(size=5), None, USER)

    async def open_truncating() -> None:
        await tree.release(await tree.open(inode, os.O_WRONLY | os.O_TRUNC))

    async def change_owner() -> None:
        await tree.setattr(inode, *fields(uid=5), None, ROOT_USER)

    for change in (write, truncate, open_truncating, change_owner):
        await tree.setattr(inode, *fields(mode=0o6755), None, ROOT_USER)
        await change()
        assert oct(os.stat(lower_dir / "file").st_mode) == "0o100755", change
    await tree.setattr(inode, *fields(mode=0o2745), None, ROOT_USER)  # no group execute: mandatory locking's old mark
    await write()
    assert oct(os.stat(lower_dir / "file").st_mode) == "0o102745"
    await tree.release(handle)


async def test_extended_attributes(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").touch()
    inode = await inode_of(tree, b"file")
    with pytest.raises(errors.NoSuchAttributeError):
        await tree.getxattr(inode, b"user.a")
    await tree.setxattr(inode, b"user.a", b"1\0\xff")
    await tree.setxattr(inode, b"user.empty", b"")
    await tree.setxattr(inode, b"trusted.t", b"t")
    assert await tree.getxattr(inode, b"user.a") == b"1\0\xff"
    assert await tree.getxattr(inode, b"user.empty") == b""
    assert sorted(await tree.listxattr(inode, ROOT_USER)) == [b"trusted.t", b"user.a", b"user.empty"]
    assert sorted(await tree.listxattr(inode, USER)) == [b"user.a", b"user.empty"]
    await tree.removexattr(inode, b"user.a")
    with pytest.raises(errors.NoSuchAttributeError):
        await tree.removexattr(inode, b"user.a")
    assert os.listxattr(lower_dir / "file") == ["user.empty", "trusted.t"]


async def test_posix_acls_are_not_offered(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").touch()
    user_obj, user, group_obj, mask, other = (1, 6, NO_ID), (2, 6, 1234), (4, 4, NO_ID), (16, 6, NO_ID), (32, 4, NO_ID)
    acl = b"".join(struct.pack("<HHI", *entry) for entry in (user_obj, user, group_obj, mask, other))
    os.setxattr(lower_dir / "file", "system.posix_acl_access", struct.pack("<I", 2) + acl)
    inode = await inode_of(tree, b"file")
    assert await tree.listxattr(inode, ROOT_USER) == []
    for call in (
        tree.getxattr(inode, b"system.posix_acl_access"),
        tree.setxattr(inode, b"system.posix_acl_access", b"x"),
        tree.removexattr(inode, b"system.posix_acl_access"),
    ):
        with pytest.raises(errors.NotSupportedError):
            await call


async def test_capability_set_after_it_was_absent_is_seen(tree: LowerTree, lower_dir: Path) -> None:
    (lower_dir / "file").touch()
    inode = await inode_of(tree, b"file")
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    for _ in range(3):
        with pytest.raises(errors.NoSuchAttributeError):
            await tree.getxattr(inode, b"security.capability")
    await tree.setxattr(inode, b"security.capability", capability)
    assert await tree.getxattr(inode, b"security.capability") == capability
    await tree.removexattr(inode, b"security.capability")
    with pytest.raises(errors.NoSuchAttributeError):
        await tree.getxattr(inode, b"security.capability")


async def test_statfs_is_the_lower_file_systems(tree: LowerTree, lower_dir: Path) -> None:
    data, expected = await tree.statfs(), os.statvfs(lower_dir)
    for name in ("bsize", "frsize", "blocks", "files", "namemax"):
        assert getattr(data, f"f_{name}") == getattr(expected, f"f_{name}"), name


async def test_directory_is_synced(tree: LowerTree) -> None:
    await tree.fsyncdir(ROOT)


# --- cancellation


async def test_cancelled_calls_leak_nothing(lower_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while waiting for a thread, and while in one: no fd, no count, no handle is left over."""
    monkeypatch.setattr(lower, "stays_in_memory", _never)
    (lower_dir / "file").write_bytes(b"bytes")
    before = open_fds()
    async with tree_over(lower_dir, threads_max=1) as tree:
        inode = await inode_of(tree, b"file")
        calls = (
            lambda: tree.lookup(ROOT, b"file"),
            lambda: tree.open(inode, os.O_RDWR),
            lambda: tree.create(ROOT, b"new", 0o644, os.O_RDWR, ROOT_USER),
            lambda: tree.mkdir(ROOT, b"dir", 0o755, ROOT_USER),
            lambda: tree.link(inode, ROOT, b"link"),
            lambda: tree.getattr(inode),
        )
        go_on = Event()
        held = tree._calls.run(go_on.wait)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: held)
                await trio.testing.wait_all_tasks_blocked()
                for call in calls:
                    nursery.start_soon(call)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                go_on.set()
        assert (tree.known_inodes, tree.lookups, tree.open_files) == (1, 1, 0)
        assert os.listdir(lower_dir) == ["file"]
        assert [node.pins for node in tree._inodes.table._nodes.values()] == [0, 0]
        await tree.forget([(inode, 1)])
    assert open_fds() == before


async def test_call_cancelled_in_its_thread_delivers_what_it_opened(
    lower_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_fds()
    begun, go_on = Event(), Event()
    open_inode = lower_disk.open_inode

    def slow(fd: int, flags: int) -> lower_disk.Found:
        begun.set()
        go_on.wait(20)
        return open_inode(fd, flags)

    monkeypatch.setattr(lower_disk, "open_inode", slow)
    (lower_dir / "file").write_bytes(b"bytes")
    async with tree_over(lower_dir) as tree:
        inode = await inode_of(tree, b"file")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tree.open, inode, os.O_RDWR)
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()
            go_on.set()
        assert tree.open_files == 1
        await tree.release(FIRST_HANDLE)
        await tree.forget([(inode, 1)])
    assert open_fds() == before


async def test_release_and_forget_close_their_fds_though_cancelled(lower_dir: Path) -> None:
    (lower_dir / "file").touch()
    async with tree_over(lower_dir) as tree:
        before = open_fds()
        inode = await inode_of(tree, b"file")
        handle = await tree.open(inode, os.O_RDONLY)
        with trio.CancelScope() as scope:
            scope.cancel()
            await tree.release(handle)
            await tree.forget([(inode, 1)])
        assert open_fds() == before


async def test_file_released_during_a_read_is_closed_after_it(lower_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lower_dir / "file").write_bytes(b"bytes")
    begun, go_on = Event(), Event()
    pread = os.pread

    def slow(fd: int, size: int, offset: int) -> bytes:
        begun.set()
        go_on.wait(20)
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", slow)
    async with tree_over(lower_dir) as tree:
        inode = await inode_of(tree, b"file")
        before = open_fds()
        handle = await tree.open(inode, os.O_RDONLY)
        got: list[bytes] = []

        async def read() -> None:
            got.append(bytes(await tree.read(handle, 0, 100)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.to_thread.run_sync(begun.wait)
            await tree.release(handle)
            assert tree.open_files == 0
            go_on.set()
        assert got == [b"bytes"]
        assert open_fds() == before


@pytest.mark.parametrize("meanwhile", ["forgotten", "looked up"])
async def test_inode_in_use_keeps_its_fd(lower_dir: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str) -> None:
    """Neither the kernel's forget nor a lookup that brings a newer fd may close the one that a thread works on."""
    (lower_dir / "file").write_bytes(b"bytes")
    os.setxattr(lower_dir / "file", "user.a", b"value")
    begun, go_on = Event(), Event()
    get_attribute = lower_xattrs.get_attribute

    def slow(fd: int, name: bytes) -> bytes:
        begun.set()
        go_on.wait(20)
        return get_attribute(fd, name)

    monkeypatch.setattr(lower_xattrs, "get_attribute", slow)
    async with tree_over(lower_dir) as tree:
        before = open_fds()
        inode = await inode_of(tree, b"file")
        got: list[bytes] = []

        async def get() -> None:
            got.append(await tree.getxattr(inode, b"user.a"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(get)
            await trio.to_thread.run_sync(begun.wait)
            if meanwhile == "looked up":
                await inode_of(tree, b"file")
            await tree.forget([(inode, tree.lookups)])
            assert tree.known_inodes == 0
            go_on.set()
        assert got == [b"value"]
        assert open_fds() == before

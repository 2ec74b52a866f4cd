"""Reads of lower files that are answered at once: exact, or left to the blocking read; never of another file."""

import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from basefs.concurrency.threads import BlockingCalls
from basefs.fuse import lower_files
from basefs.fuse.lower import LowerTree
from basefs.fuse.lower_files import _hit_of
from basefs.fuse.operations import Operations
from tests.fakes.escrow import MemoryEscrow

ROOT = 1
ROOT_USER = SimpleNamespace(uid=0, gid=0, umask=0o022, pid=1)
MIB = 1 << 20
SIZES = st.one_of(st.integers(1, 9000), st.sampled_from([4096, 65536, 131072, MIB, MIB + 4096]))


@pytest.fixture
def lower_dir(tmp_path: Path) -> Path:
    path = tmp_path / "lower"
    path.mkdir()
    return path


@pytest.fixture
async def tree(lower_dir: Path) -> AsyncIterator[LowerTree]:
    root_fd = os.open(lower_dir, os.O_RDONLY | os.O_DIRECTORY)
    escrow = MemoryEscrow()
    made = LowerTree(root_fd, BlockingCalls("lower", threads_max=4), escrow, first_handle=1 << 62)
    os.close(root_fd)
    try:
        yield made
    finally:
        await made.close()
        escrow.close()


async def opened(tree: LowerTree, name: bytes, flags: int = os.O_RDONLY) -> int:
    entry = await tree.lookup(ROOT, name)
    return await tree.open(entry.st_ino, flags)


def face_over(tree: LowerTree) -> Operations:
    images = SimpleNamespace(hits={})
    virtual = SimpleNamespace(owns_handle=lambda _handle: False)
    return Operations(tree, images, virtual, SimpleNamespace())


class Model:
    """A file, and what it holds; changed by another handle than the one that is read."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.reader = os.open(path, os.O_RDONLY)
        self.bytes = bytearray()

    def write(self, offset: int, length: int, fill: int) -> None:
        data = bytes([fill]) * length
        os.pwrite(self.fd, data, offset)
        self.bytes.extend(bytes(max(0, offset + length - len(self.bytes))))
        self.bytes[offset : offset + length] = data

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        del self.bytes[size:]
        self.bytes.extend(bytes(size - len(self.bytes)))

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.reader)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_hit_is_exact_after_whatever_another_handle_or_host_did(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = Model(tmp_path_factory.mktemp("hits") / "file")
    hit = _hit_of(file.reader, lambda: pytest.fail("this file system can tell"))
    offsets = st.one_of(st.integers(0, 2 * MIB), st.integers(0, 512).map(lambda page: page * 4096))
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["write", "truncate", "read", "read"])):
            case "write":
                file.write(data.draw(offsets), data.draw(SIZES), data.draw(st.integers(1, 255)))
            case "truncate":
                file.truncate(data.draw(offsets))
            case "read":
                offset, size = data.draw(offsets), data.draw(SIZES)
                got = hit(offset, size)
                wanted = file.bytes[offset : offset + size]
                assert got is None or bytes(got) == wanted
    file.close()


async def test_the_face_answers_at_once_what_is_in_memory(tree: LowerTree, lower_dir: Path) -> None:
    data = os.urandom(3 * MIB + 1)
    (lower_dir / "file").write_bytes(data)
    handle = await opened(tree, b"file")
    face = face_over(tree)
    for offset, size in ((0, 4096), (1, 4095), (MIB, MIB), (len(data), 4096), (len(data) + 5, 1)):
        assert bytes(await face.read(handle, offset, size)) == data[offset : offset + size]
    assert (face.lower_hits, face.hits, face.requests["read"]) == (5, 0, 0)
    assert bytes(await face.read(handle, len(data) - 10, 4096)) == data[-10:]  # only a blocking read knows the end
    assert bytes(await face.read(handle, 0, 2 * MIB)) == data[: 2 * MIB]
    assert (face.lower_hits, face.requests["read"]) == (5, 2)
    await tree.release(handle)


@pytest.mark.parametrize("answer", [errno.EAGAIN, errno.EIO, errno.EINTR, 1, 4095])
async def test_what_memory_does_not_give_whole_is_read_in_a_thread(
    tree: LowerTree, lower_dir: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    """`answer`: an errno or a count that the read from memory gives."""
    data = os.urandom(10_000)
    (lower_dir / "file").write_bytes(data)
    face, handle = face_over(tree), await opened(tree, b"file")

    def short(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        if answer in (1, 4095):
            return os.preadv(fd, [buffers[0][:answer]], offset)
        raise OSError(answer, "not at once")

    monkeypatch.setattr(lower_files, "_preadv", short)
    assert await face.read(handle, 100, 9000) == data[100:9100]
    assert await face.read(handle, 9000, 5000) == data[9000:]
    monkeypatch.undo()
    assert bytes(await face.read(handle, 100, 9000)) == data[100:9100]
    assert (face.requests["read"], face.lower_hits) == (2, 1)
    await tree.release(handle)


async def test_where_a_file_system_cannot_tell_its_handle_is_read_in_threads_for_good(
    tree: LowerTree, lower_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lower_dir / "file").write_bytes(b"0123456789")
    face = face_over(tree)
    handles = [await opened(tree, b"file") for _ in range(2)]
    tries: list[int] = []

    def cannot(fd: int, _buffers: list[memoryview], _offset: int, _flags: int) -> int:
        tries.append(fd)
        raise OSError(errno.EOPNOTSUPP, "as NFS says")

    monkeypatch.setattr(lower_files, "_preadv", cannot)
    for _ in range(3):
        assert await face.read(handles[0], 2, 3) == b"234"
    assert len(tries) == 1
    assert list(tree.hits) == [handles[1]]
    for handle in handles:
        await tree.release(handle)
    assert not tree.hits


async def test_a_released_handle_reads_nothing_of_the_file_that_has_its_number_now(
    tree: LowerTree, lower_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lower_dir / "one").write_bytes(b"of one")
    (lower_dir / "two").write_bytes(b"of two")
    handle = await opened(tree, b"one")
    fd = tree._files.find(handle).fd
    drop = MemoryEscrow.drop
    seen: list[bool] = []

    async def watched(escrow: MemoryEscrow, key: str) -> None:
        seen.append(handle in tree.hits)  # while the release waits, and before the fd is closed
        await trio.lowlevel.checkpoint()
        await drop(escrow, key)

    monkeypatch.setattr(MemoryEscrow, "drop", watched)
    await tree.release(handle)
    assert seen == [False]
    second = os.open(lower_dir / "two", os.O_RDONLY)
    try:
        assert second == fd or fd not in map(int, os.listdir("/proc/self/fd"))
        assert handle not in tree.hits
    finally:
        os.close(second)


async def test_handles_of_an_earlier_server_are_read_at_once_too(lower_dir: Path) -> None:
    (lower_dir / "file").write_bytes(b"0123456789")
    escrow = MemoryEscrow()
    root_fd = os.open(lower_dir, os.O_RDONLY | os.O_DIRECTORY)
    made: Callable[[], LowerTree] = lambda: LowerTree(  # noqa: E731
        root_fd, BlockingCalls("lower", threads_max=4), escrow, first_handle=1 << 62
    )
    before = made()
    handle = await opened(before, b"file", os.O_RDWR)
    await before.close()
    assert not before.hits
    after = made()
    await after.restore(escrow.held())
    (lower_dir / "file").unlink()
    await after.write(handle, 3, b"xyz")
    assert bytes(after.hits[handle](2, 5)) == b"2xyz6"
    await after.close()
    os.close(root_fd)
    escrow.close()

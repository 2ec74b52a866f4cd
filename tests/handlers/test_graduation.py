"""An image becomes a file of the lower directory: each way, under readers, failures, a second host, a full disk."""

import errno
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.cache.chunk_file import data_path, map_path
from basefs.core.inodes import image_inode
from basefs.handlers import making, parts
from tests.conftest import ExpectedWarnings
from tests.fakes.escrow import MemoryEscrow
from tests.handlers.graduation_node import HOST, PATIENCE, Node, a_node, disk_content, qcow2_of

SIZE = 1_300_007
FAILED = "did not become a file of the lower directory"
CONTENT = disk_content(1, SIZE)


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """A directory on another file system than tmp_path: a tmpfs."""
    path = Path(tempfile.mkdtemp(prefix="basefs-graduation-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["rename", "copy", "clone", "no rename"])
def lower(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A lower directory to which an image comes by each of the ways."""
    if request.param == "rename":
        yield tmp_path / "lower"
        return
    if request.param == "no rename":
        # One file system behind two mounts.
        monkeypatch.setattr(parts, "rename_with_flags", _refuse_other_directories)
        yield tmp_path / "lower"
        return
    if request.param == "clone":
        monkeypatch.setattr(parts, "clone", _clone)  # no file system of the test machines shares blocks
    directory = Path(tempfile.mkdtemp(prefix="basefs-graduation-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


def _clone(source_fd: int, part_fd: int) -> bool:
    size = os.fstat(source_fd).st_size
    assert os.pwrite(part_fd, os.pread(source_fd, size, 0), 0) == size
    return True


_rename = parts.rename_with_flags


def _refuse_other_directories(old_fd: int, old_name: bytes, new_fd: int, new_name: bytes, flags: int) -> None:
    if old_fd == -1:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    _rename(old_fd, old_name, new_fd, new_name, flags)


async def test_an_image_becomes_a_file_and_its_readers_go_on(tmp_path: Path, lower: Path) -> None:
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        await node.open()
        await node.complete()
        before = await node.handler.fetch_image(node.entry)
        await node.graduator.graduate(node.entry)
        node.check_made()
        assert list(node.escrow.kept) == [f"graduated/{node.entry.number}"]
        assert before.hit(0, 10) is None, "a closed chunk file has nothing, whatever has its fd number now"
        await node.check_read()
        node.file.unlink()
        await node.check_read()
        await node.handler.released(node.entry)
        assert node.escrow.kept == {}
        assert node.graduated.get(node.entry.number) is None
        assert node.graduator.counters.images == 1


async def test_holes_stay_holes(tmp_path: Path, lower: Path) -> None:
    content = bytes(4 << 20) + b"end"
    async with a_node(tmp_path, content, lower=lower) as node:
        await node.complete()
        await node.graduator.graduate(node.entry)
        assert node.file.stat().st_size == len(content)
        if parts.clone is not _clone:
            assert node.file.stat().st_blocks * 512 < 64 * 1024


async def test_an_image_that_nobody_has_open_leaves_nothing_open(tmp_path: Path, lower: Path) -> None:
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        await node.complete()
        await node.graduator.graduate(node.entry)
        node.check_made()
        assert node.escrow.kept == {}
        assert node.graduated.get(node.entry.number) is None
        await node.open()  # by a dentry of before
        await node.check_read()
        assert not node.has_chunks()
        await node.handler.released(node.entry)
        assert node.escrow.kept == {}


async def test_once_the_file_is_gone_the_image_is_lazy_again(tmp_path: Path, lower: Path) -> None:
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        await node.complete()
        await node.graduator.graduate(node.entry)
        node.file.unlink()
        await node.open()
        await node.check_read()
        assert not node.entry.local.is_graduated
        assert node.entry.local.whole == "unknown"
        assert node.has_chunks()
        await node.complete()
        await node.graduator.graduate(node.entry)
        node.check_made()


async def test_an_open_image_whose_file_is_gone_graduates_anew(tmp_path: Path, lower: Path) -> None:
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        await node.open()
        await node.complete()
        await node.graduator.graduate(node.entry)
        node.file.unlink()
        node.graduated.gone(node.entry)
        await node.complete()
        await node.check_read()
        await node.graduator.graduate(node.entry)
        node.check_made()
        await node.check_read()
        assert len(node.escrow.kept) == 1


@pytest.mark.parametrize("arguments", [(), ("-c",), ("-o", "cluster_size=512"), ("-o", "cluster_size=2M")])
async def test_a_qcow2_image_becomes_the_raw_disk_in_it(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    content = disk_content(2, 3 * 512 * 1999)
    stored = qcow2_of(tmp_path, content, *arguments)
    async with a_node(tmp_path, content, stored_bytes=stored) as node:
        await node.open()
        await node.complete()
        await node.graduator.graduate(node.entry)
        node.check_made()
        await node.check_read()
        assert node.file.stat().st_blocks * 512 < len(content), "it is sparse"


async def test_a_qcow2_image_that_qemu_img_refuses_stays(tmp_path: Path, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings(f"{FAILED}: qemu-img convert ended with 1: .*qcow2 format")
    async with a_node(tmp_path, CONTENT, stored_bytes=CONTENT) as node:
        node.entry.local.shown_size = SIZE + 1
        await node.complete()
        with pytest.raises(errors.CacheError, match="qemu-img convert ended with 1"):
            await node.graduator.graduate(node.entry)
        node.check_nothing_made()


async def test_a_disk_that_is_not_as_long_as_it_was_shown_gets_no_name(
    tmp_path: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(f"{FAILED}: .*1048576 bytes long and was shown with 1048575")
    stored = qcow2_of(tmp_path, bytes(1 << 20))
    async with a_node(tmp_path, bytes(1 << 20), stored_bytes=stored) as node:
        node.entry.local.shown_size = (1 << 20) - 1
        await node.complete()
        with pytest.raises(errors.LowerFileError):
            await node.graduator.graduate(node.entry)
        node.check_nothing_made()


@pytest.mark.parametrize("seed", range(4))
async def test_readers_at_random_places_while_it_graduates(tmp_path: Path, lower: Path, seed: int) -> None:
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        await node.open()
        await node.complete()
        done = trio.Event()
        hits = (await node.handler.fetch_image(node.entry)).hit

        async def read(seed: int) -> None:
            nonlocal hits
            rng = random.Random(seed)
            rounds_after = 20
            while rounds_after:
                rounds_after -= done.is_set()
                offset, size = rng.randrange(SIZE), rng.choice([1, 512, 4096, 100_000, 1 << 20])
                found = hits(offset, size)
                if found is None:
                    image = await node.handler.fetch_image(node.entry)
                    hits = image.hit
                    data = bytes(hits(offset, size) or await image.read(offset, size, PATIENCE))
                else:
                    data = bytes(found)
                assert data == CONTENT[offset : offset + size]
                for _ in range(rng.randrange(4)):
                    await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for reader in range(8):
                nursery.start_soon(read, seed * 100 + reader)
            for _ in range(seed * 3):
                await trio.lowlevel.checkpoint()
            await node.graduator.graduate(node.entry)
            done.set()
        node.check_made()


@pytest.mark.parametrize("step", ["create_part", "copy_chunks", "finish", "publish", "free_bytes", "move", "reopened"])
async def test_a_step_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, other_disk: Path, step: str, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(f"{FAILED}: .*No space left")
    lower = tmp_path / "lower" if step == "move" else other_disk
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        await node.open()
        await node.complete()
        with monkeypatch.context() as patch:
            patch.setattr(parts, step, _fail)
            with pytest.raises(errors.LowerFileError):
                await node.graduator.graduate(node.entry)
        node.check_nothing_made()
        assert node.escrow.kept == {}
        await node.check_read()
        assert node.entry.local.cached_bytes == SIZE
        assert node.graduator.counters.failures == 1
        status = data_path(node.chunks, image_inode(node.entry.number)).stat()
        assert (status.st_mode & 0o777, status.st_uid) == (0o600, os.geteuid())
        await node.graduator.graduate(node.entry)
        node.check_made()
        await node.check_read()


def _fail(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_an_image_that_was_not_verified_stays(tmp_path: Path, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings(f"{FAILED}: it was not verified as a whole")
    async with a_node(tmp_path, CONTENT) as node:
        await node.complete()
        node.entry.local.whole = "unknown"
        with pytest.raises(errors.CacheError, match="not verified"):
            await node.graduator.graduate(node.entry)
        node.check_nothing_made()


async def test_an_image_with_a_chunk_missing_stays(
    tmp_path: Path, other_disk: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(f"{FAILED}: .*bytes are missing")
    for number, lower in enumerate((tmp_path / "lower", other_disk)):
        directory = tmp_path / str(number)
        directory.mkdir()
        async with a_node(directory, CONTENT, lower=lower) as node:
            await node.complete()
            (await node.handler.downloaded_image(node.entry)).fetcher._ledger.lose(3)
            with pytest.raises(errors.CacheError, match="bytes are missing"):
                await node.graduator.graduate(node.entry)
            node.check_nothing_made()
            await node.check_read()


async def test_a_damage_on_the_disk_gets_no_name(
    tmp_path: Path, lower: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(f"{FAILED}: a chunk was damaged on the disk")
    expected_warnings("cached chunks from byte .* are damaged")
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        await node.open()
        await node.complete()
        with data_path(node.chunks, image_inode(node.entry.number)).open("r+b") as file:
            file.seek(500_000)
            file.write(b"damage")
        with pytest.raises(errors.CacheError, match="damaged"):
            await node.graduator.graduate(node.entry)
        node.check_nothing_made()
        assert node.entry.local.whole == "unknown"
        await node.check_read()
        await node.complete()
        await node.graduator.graduate(node.entry)
        node.check_made()


async def test_nothing_is_evicted_while_it_graduates(tmp_path: Path, lower: Path) -> None:
    """The evictor tries at every checkpoint; a chunk that it took would be zeros in the file."""
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        await node.open()
        await node.complete()
        fetcher = (await node.handler.downloaded_image(node.entry)).fetcher
        tried = 0

        async def evict() -> None:
            nonlocal tried
            while fetcher.has_file:
                if fetcher._ledger._held:
                    await fetcher.eviction.evict(0, 1 << 16)
                    tried += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(evict)
            await node.graduator.graduate(node.entry)
        assert tried
        node.check_made()


@pytest.mark.parametrize("is_open", [True, False])
async def test_who_comes_second_finds_the_work_done(
    tmp_path: Path, lower: Path, monkeypatch: pytest.MonkeyPatch, is_open: bool
) -> None:
    """Another host makes the file while ours is being made."""
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        if is_open:
            await node.open()
        await node.complete()
        finish = parts.finish

        def other_first(fd: int, shown: parts.ShownFile) -> int:
            node.file.write_bytes(CONTENT)
            return finish(fd, shown)

        monkeypatch.setattr(parts, "finish", other_first)
        await node.graduator.graduate(node.entry)
        assert os.listdir(node.lower) == [node.entry.base_name]
        assert node.file.read_bytes() == CONTENT
        assert node.has_chunks() is is_open
        assert node.graduator.counters == type(node.graduator.counters)()
        await node.check_read()


async def test_a_file_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    async with a_node(tmp_path, CONTENT) as node:
        await node.complete()
        node.file.write_bytes(b"nova's own")
        assert await node.graduator.is_lower(node.entry)
        await node.graduator.graduate(node.entry)
        assert node.file.read_bytes() == b"nova's own"
        assert not node.has_chunks()


async def test_switched_off_it_does_nothing(tmp_path: Path) -> None:
    async with a_node(tmp_path, CONTENT, is_on=False) as node:
        await node.complete()
        await node.graduator.graduate(node.entry)
        node.check_nothing_made()


async def test_without_room_nothing_is_begun(
    tmp_path: Path, other_disk: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(f"{FAILED}: the lower directory's file system has [0-9]+ bytes free")
    async with a_node(tmp_path, CONTENT, lower=other_disk, reserve_bytes=1 << 60) as node:
        await node.complete()
        with pytest.raises(errors.CacheError, match="shall stay"):
            await node.graduator.graduate(node.entry)
        node.check_nothing_made()


async def test_many_ask_at_once_and_it_is_made_once(tmp_path: Path, lower: Path) -> None:
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        await node.complete()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(node.graduator.graduate, node.entry)
        node.check_made()
        assert node.graduator.counters.images == 1


# --- the next server -----------------------------------------------------------------------------------------


async def _begin(node: Node) -> None:
    await node.open()
    await node.complete()


async def test_the_next_server_reads_on_from_what_it_was_left(tmp_path: Path, lower: Path) -> None:
    escrow = MemoryEscrow()
    async with a_node(tmp_path, CONTENT, lower=lower, escrow=escrow) as node:
        await _begin(node)
        await node.graduator.graduate(node.entry)
        entry = node.entry
    node.file.unlink()
    async with a_node(tmp_path, CONTENT, lower=lower, escrow=escrow, entry=entry) as node:
        node.handler.restore_opens({entry.number: 1})
        await node.check_read()
        assert not entry.local.is_graduated, "its name is gone"
        assert not node.has_chunks()
        await node.handler.released(entry)
        assert escrow.kept == {}
    escrow.close()


async def test_a_server_killed_before_the_name_was_given_loses_nothing(
    tmp_path: Path, lower: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    """At the worst moment: the readers were moved over and the fd was left with the keeper."""
    expected_warnings(f"{FAILED}: .*killed")
    escrow = MemoryEscrow()
    async with a_node(tmp_path, CONTENT, lower=lower, escrow=escrow) as node:
        await _begin(node)
        left = []

        def kill(*_arguments: object) -> None:
            left.extend(escrow.held())
            raise OSError(errno.EIO, "killed")

        with monkeypatch.context() as patch:
            patch.setattr(parts, "move", kill)
            patch.setattr(parts, "publish", kill)
            patch.setattr(parts, "remove_part", lambda *_arguments: None)
            with pytest.raises(errors.LowerFileError):
                await node.graduator.graduate(node.entry)
        entry = node.entry
    assert len(left) == 1
    async with a_node(tmp_path, CONTENT, lower=lower, entry=entry, must_tidy=False) as node:
        await node.graduated.restore(left, lambda _number: entry)
        await node.graduator.tidy_up(lambda: [entry])
        node.handler.restore_opens({entry.number: 1})
        node.check_nothing_made()
        assert node.graduated.get(entry.number) is None
        await node.check_read()
        await node.graduator.graduate(entry)
        node.check_made()


async def test_a_server_killed_before_it_noted_the_name_is_finished(tmp_path: Path, lower: Path) -> None:
    """The file has its name; that and the chunk files' removal were not noted."""
    async with a_node(tmp_path, CONTENT, lower=lower) as node:
        await node.complete()
        entry, inode = node.entry, image_inode(node.entry.number)
        kept = map_path(node.chunks, inode).read_bytes()
        await node.graduator.graduate(entry)
    entry.local.is_graduated, entry.local.cached_bytes, entry.local.whole = False, SIZE, "verified"
    map_path(node.chunks, inode).write_bytes(kept)
    async with a_node(tmp_path, CONTENT, lower=lower, entry=entry) as node:
        node.check_made()


async def test_parts_of_this_host_are_removed_at_the_start_and_no_others(tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    name = "0123456789" * 4
    theirs = {f".basefs.{name}.otherhost.part", f".basefs.{name}.part", "notes.txt", f"{name}.part"}
    for one in (*theirs, f".basefs.{name}.{HOST}.part"):
        (lower / one).write_bytes(b"x")
    async with a_node(tmp_path, CONTENT):
        assert set(os.listdir(lower)) == theirs


async def test_a_map_whose_data_became_the_file_counts_for_nothing(tmp_path: Path) -> None:
    async with a_node(tmp_path, CONTENT) as node:
        await node.complete()
        await node.handler.close()
        data_path(node.chunks, image_inode(node.entry.number)).unlink()
        image = await node.handler.downloaded_image(node.entry)
        assert image.fetcher.cached_bytes == 0
        await node.check_read()


# --- a disk that fills up ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A lower directory with room for half of the image."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.mount
@pytest.mark.parametrize("is_qcow2", [False, True])
async def test_a_disk_that_is_full_is_left_as_it_was(
    tmp_path: Path,
    small_disk: Path,
    is_qcow2: bool,
    monkeypatch: pytest.MonkeyPatch,
    expected_warnings: ExpectedWarnings,
) -> None:
    """Somebody else fills it after the look at its free space."""
    expected_warnings(f"{FAILED}: .*No space left")
    monkeypatch.setattr(parts, "free_bytes", lambda _fd: 1 << 40)
    content = disk_content(3, 3000 * 512)
    stored = qcow2_of(tmp_path, content) if is_qcow2 else None
    async with a_node(tmp_path, content, lower=small_disk, stored_bytes=stored) as node:
        await node.open()
        await node.complete()
        with pytest.raises(errors.BasefsError, match="No space left"):
            await node.graduator.graduate(node.entry)
        node.check_nothing_made()
        await node.check_read()
        status = os.statvfs(small_disk)
        assert status.f_bfree == status.f_blocks


async def test_qemu_img_is_ended_when_the_room_becomes_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(f"{FAILED}: the lower directory's file system has 5 bytes free")
    free = [1 << 40, 1 << 40, 5]

    async def never_ends(*_arguments: object, **_named: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(making, "convert", never_ends)
    monkeypatch.setattr(making, "LOOK_S", 0.0)
    monkeypatch.setattr(parts, "free_bytes", lambda _fd: free.pop(0) if len(free) > 1 else free[0])
    stored = qcow2_of(tmp_path, bytes(1 << 20))
    async with a_node(tmp_path, bytes(1 << 20), stored_bytes=stored, reserve_bytes=6) as node:
        await node.complete()
        with pytest.raises(errors.CacheError, match="5 bytes free"):
            await node.graduator.graduate(node.entry)
        node.check_nothing_made()


async def test_the_end_of_the_server_ends_it_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = trio.Event()

    async def never_ends(*_arguments: object, **_named: object) -> None:
        begun.set()
        await trio.sleep_forever()

    monkeypatch.setattr(making, "convert", never_ends)
    stored = qcow2_of(tmp_path, bytes(1 << 20))
    async with a_node(tmp_path, bytes(1 << 20), stored_bytes=stored) as node:
        await node.complete()

        async def graduate() -> None:
            with pytest.raises(errors.ControlError, match="shutting down"):
                await node.graduator.graduate(node.entry)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(graduate)
            await begun.wait()
            await node.graduator.stop()
        node.check_nothing_made()
        with pytest.raises(errors.ControlError, match="shutting down"):
            await node.graduator.graduate(node.entry)

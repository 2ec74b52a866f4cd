"""Open lower files from one server to the next: a LowerTree that goes on with what another left in escrow."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest

from basefs import errors
from basefs.fuse import lower_files
from tests.fakes.escrow import MemoryEscrow
from tests.fuse.test_lower_tree import ROOT, ROOT_USER, open_fds, tree_over


@pytest.fixture
def escrow() -> Iterator[MemoryEscrow]:
    before = open_fds()
    escrow = MemoryEscrow()
    yield escrow
    escrow.close()
    assert open_fds() == before


async def test_an_unlinked_open_file_is_read_written_and_statted_by_the_next_server(
    tmp_path: Path, escrow: MemoryEscrow
) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    async with tree_over(tmp_path, escrow=escrow) as tree:
        inode = (await tree.lookup(ROOT, b"file")).st_ino
        handle = await tree.open(inode, os.O_RDWR)
        await tree.unlink(ROOT, b"file")
    async with tree_over(tmp_path, escrow=escrow) as tree:
        assert bytes(await tree.read(handle, 2, 3)) == b"234"
        assert await tree.write(handle, 10, b"more") == 4
        await tree.fsync(handle, datasync=False)
        attributes = await tree.getattr(inode)
        assert (attributes.st_size, attributes.st_nlink) == (14, 0)
        # The kernel's own count is not known: a forget is not the last word while the file is open.
        await tree.forget([(inode, 1)])
        assert (await tree.getattr(inode)).st_size == 14
        await tree.release(handle)
        assert (tree.open_files, tree.known_inodes, escrow.kept) == (0, 0, {})
        with pytest.raises(errors.NoSuchEntryError):
            await tree.getattr(inode)


async def test_the_kernel_forgets_a_restored_inode_after_its_last_close(tmp_path: Path, escrow: MemoryEscrow) -> None:
    (tmp_path / "file").write_bytes(b"x")
    async with tree_over(tmp_path, escrow=escrow) as tree:
        inode = (await tree.lookup(ROOT, b"file")).st_ino
        handles = [await tree.open(inode, os.O_RDONLY) for _ in range(3)]
    async with tree_over(tmp_path, escrow=escrow) as tree:
        assert (tree.open_files, tree.known_inodes) == (3, 1)
        for handle in handles:
            await tree.release(handle)
        assert tree.known_inodes == 1
        await tree.forget([(inode, 1)])
        assert tree.known_inodes == 0


async def test_a_handle_opened_for_reading_stays_one(tmp_path: Path, escrow: MemoryEscrow) -> None:
    (tmp_path / "file").write_bytes(b"x")
    async with tree_over(tmp_path, escrow=escrow) as tree:
        inode = (await tree.lookup(ROOT, b"file")).st_ino
        handle = await tree.open(inode, os.O_RDONLY)
    async with tree_over(tmp_path, escrow=escrow) as tree:
        with pytest.raises(errors.LowerFileError):
            await tree.write(handle, 0, b"y")


async def test_no_server_gives_a_handle_that_one_before_it_gave(tmp_path: Path, escrow: MemoryEscrow) -> None:
    given: set[int] = set()
    for number in range(3):
        async with tree_over(tmp_path, escrow=escrow) as tree:
            handle, _ = await tree.create(ROOT, b"%d" % number, 0o644, os.O_RDWR, ROOT_USER)
            assert handle not in given
            given.add(handle)
            assert {await tree.write(old, 0, b"x") for old in given} == {1}


async def test_a_new_file_with_the_number_of_one_that_the_last_server_told_of_has_another_generation(
    ext4: Path, escrow: MemoryEscrow
) -> None:
    lower = ext4 / "lower"  # directories of the root itself are spread, and get other numbers
    lower.mkdir()
    async with tree_over(lower, escrow=escrow) as tree:
        old = await tree.mkdir(ROOT, b"old", 0o755, ROOT_USER)
    async with tree_over(lower, escrow=escrow) as tree:
        await tree.rmdir(ROOT, b"old")
        new = await tree.mkdir(ROOT, b"new", 0o755, ROOT_USER)
        assert new.st_ino == old.st_ino, "ext4 gives the number again"
        assert new.generation != old.generation


async def test_an_inode_has_one_generation_whatever_server_tells_of_it_in_whatever_answer(
    tmp_path: Path, escrow: MemoryEscrow
) -> None:
    told: dict[int, set[int]] = {}

    def note(_: bytes, entry: pyfuse3.EntryAttributes, __: int) -> bool:
        told.setdefault(entry.st_ino, set()).add(entry.generation)
        return True

    async with tree_over(tmp_path, escrow=escrow) as tree:
        handle, file = await tree.create(ROOT, b"file", 0o644, os.O_RDWR, ROOT_USER)
        await tree.write(handle, 0, b"grows")
        for made in (
            file,
            await tree.link(file.st_ino, ROOT, b"link"),
            await tree.mkdir(ROOT, b"directory", 0o755, ROOT_USER),
            await tree.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o644, 0, ROOT_USER),
            await tree.symlink(ROOT, b"symlink", b"file", ROOT_USER),
        ):
            note(b"", made, 0)
    async with tree_over(tmp_path, escrow=escrow) as tree:
        names = [b"file", b"link", b"directory", b"fifo", b"symlink"]
        assert await tree.reply_names(ROOT, list(enumerate(names)), note)
        for name in names:
            found = await tree.lookup(ROOT, name)
            assert found is not None
            note(name, found, 0)
    assert [len(generations) for generations in told.values()] == [1] * 4
    assert len(set.union(*told.values())) == 4


async def test_a_file_is_in_escrow_until_its_release(tmp_path: Path, escrow: MemoryEscrow) -> None:
    async with tree_over(tmp_path, escrow=escrow) as tree:
        handle, _ = await tree.create(ROOT, b"file", 0o644, os.O_RDONLY, ROOT_USER)
        assert {key: note for key, (note, _) in escrow.kept.items()} == {f"lower/{handle}": "r"}
        await tree.release(handle)
        assert not escrow.kept


async def test_what_cannot_be_left_in_escrow_is_not_opened(tmp_path: Path, escrow: MemoryEscrow) -> None:
    (tmp_path / "file").write_bytes(b"x")
    async with tree_over(tmp_path, escrow=escrow) as tree:
        inode = (await tree.lookup(ROOT, b"file")).st_ino
        before = open_fds()
        escrow.refuses = OSError(errno.EMFILE, "no fd left")
        with pytest.raises(errors.LowerFileError) as caught:
            await tree.open(inode, os.O_RDONLY)
        assert caught.value.os_error.errno == errno.EMFILE
        with pytest.raises(errors.LowerFileError):
            await tree.create(ROOT, b"new", 0o644, os.O_RDWR, ROOT_USER)
        assert (tree.open_files, open_fds()) == (0, before)


async def test_at_the_limit_of_open_files_a_further_open_says_so(
    tmp_path: Path, escrow: MemoryEscrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower_files, "FILES_MAX", 2)
    async with tree_over(tmp_path, escrow=escrow) as tree:
        handle, entry = await tree.create(ROOT, b"file", 0o644, os.O_RDONLY, ROOT_USER)
        await tree.open(entry.st_ino, os.O_RDONLY)
        for attempt in (tree.open(entry.st_ino, os.O_RDONLY), tree.create(ROOT, b"n", 0o644, os.O_RDWR, ROOT_USER)):
            with pytest.raises(errors.LowerFileError) as caught:
                await attempt
            assert caught.value.os_error.errno == errno.ENFILE
        assert not (tmp_path / "n").exists()
        await tree.release(handle)
        await tree.open(entry.st_ino, os.O_RDONLY)

"""An image that is opened and removed at the same moment."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.cache.chunk_file import data_path, map_path
from basefs.cache.disk_health import DISK_RETRY_S
from basefs.catalog.records import ImageEntry
from basefs.core.inodes import image_inode
from basefs.handlers.base import Patience
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.views.choice import Views
from tests.cache.conftest import CHUNK, IMAGE_ID, make_entry
from tests.cache.memory_source import MemorySource
from tests.cache.services import make_services
from tests.conftest import ExpectedWarnings

IMAGE = bytes(range(256)) * 400
PATIENCE = Patience(deadline_s=30, is_guest=False)


@asynccontextmanager
async def a_handler(
    directory: Path, source: MemorySource | None = None, changed: Callable[[ImageEntry], None] = lambda _entry: None
) -> AsyncIterator[DownloadingTemplateImageHandler]:
    async with trio.open_nursery() as nursery:
        services = make_services(nursery, source or MemorySource({IMAGE_ID: IMAGE}), directory, changed=changed)
        handler = DownloadingTemplateImageHandler(directory, CHUNK, services, Views("raw"))
        await handler.init()
        yield handler
        await handler.close()
        nursery.cancel_scope.cancel()


async def test_an_image_removed_just_after_it_was_prepared_is_prepared_again(tmp_path: Path) -> None:
    entry = make_entry(len(IMAGE))
    async with a_handler(tmp_path) as handler:

        async def use() -> None:
            image = await handler.fetch_image(entry)
            handler.opened(entry, image)  # fails if the image is not the prepared one
            assert await image.read(0, len(IMAGE), PATIENCE) == IMAGE
            await handler.released(entry)

        async def remove_as_soon_as_it_is_there() -> None:
            while handler._images.get(entry.number) is None:
                await trio.lowlevel.checkpoint()
            await handler.remove_image(entry)

        for _ in range(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(remove_as_soon_as_it_is_there)
                nursery.start_soon(use)
            await handler.remove_image(entry)


async def test_removing_waits_for_an_opening_under_way(tmp_path: Path) -> None:
    entry = make_entry(len(IMAGE))
    async with a_handler(tmp_path) as handler:
        for _ in range(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(handler.fetch_image, entry)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(handler.remove_image, entry)
            image = await handler.fetch_image(entry)
            assert await image.read(0, len(IMAGE), PATIENCE) == IMAGE
            assert data_path(tmp_path, image_inode(entry.number)).exists(), "the open chunk file has lost its name"
            await handler.remove_image(entry)
            assert not data_path(tmp_path, image_inode(entry.number)).exists()
            assert entry.local.cached_bytes == 0


async def test_what_is_removed_is_not_verified_any_more_and_that_is_noted_before_its_files_go(tmp_path: Path) -> None:
    entry = make_entry(len(IMAGE))
    noted: list[tuple[int, str, bool]] = []

    def note(changed: ImageEntry) -> None:
        is_there = data_path(tmp_path, image_inode(entry.number)).exists()
        noted.append((changed.local.cached_bytes, changed.local.whole, is_there))

    async with a_handler(tmp_path, changed=note) as handler:
        await (await handler.fetch_image(entry)).read(0, len(IMAGE), PATIENCE)
        await trio.testing.wait_all_tasks_blocked()
        entry.local.whole = "verified"
        await handler.remove_image(entry)
    assert (0, "unknown", True) in noted


async def test_an_image_whose_files_are_gone_at_the_start_is_neither_here_nor_verified(tmp_path: Path) -> None:
    entries = {number: make_entry(len(IMAGE)) for number in (1, 2, 3)}
    for number, entry in entries.items():
        entry.number = number
    noted: list[int] = []
    async with a_handler(tmp_path) as handler:
        await (await handler.fetch_image(entries[1])).read(0, len(IMAGE), PATIENCE)
    entries[2].local.cached_bytes = len(IMAGE)
    for number in (1, 2):
        entries[number].local.whole = "verified"
    entries[3].local.is_graduated, entries[3].local.whole = True, "verified"
    async with a_handler(tmp_path, changed=lambda entry: noted.append(entry.number)) as handler:
        await handler.tidy_up(entries)
        assert noted == [2]
    assert [entries[n].local.whole for n in (1, 2, 3)] == ["verified", "unknown", "verified"]
    assert [entries[n].local.cached_bytes for n in (1, 2)] == [len(IMAGE), 0]


async def test_removing_does_not_wait_for_transfers_that_hang(tmp_path: Path) -> None:
    image = IMAGE * 40
    source = MemorySource({IMAGE_ID: image}, hold=trio.Event())
    assert source.hold is not None
    entry = make_entry(len(image))
    async with a_handler(tmp_path, source) as handler:
        prepared = await handler.fetch_image(entry)

        async def try_to_read(offset: int) -> None:
            with pytest.raises(errors.DeadlineExceededError):
                await prepared.read(offset, 10, Patience(deadline_s=0.05, is_guest=False))

        # More than there are slots: some flights hang in the source, others wait for a slot.
        async with trio.open_nursery() as nursery:
            for n in range(8):
                nursery.start_soon(try_to_read, n * len(image) // 8)
        with trio.fail_after(5):
            await handler.remove_image(entry)
        source.hold.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert entry.local.cached_bytes == 0
        again = await handler.fetch_image(entry)
        assert await again.read(0, len(image), PATIENCE) == image


async def test_an_image_in_use_gets_its_chunk_file_once_that_can_be_opened(
    tmp_path: Path, clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("serving it round the cache: .*Is a directory")
    entry = make_entry(len(IMAGE))
    source = MemorySource({IMAGE_ID: IMAGE})
    async with a_handler(tmp_path, source) as handler:
        await (await handler.fetch_image(entry)).read(0, 1, PATIENCE)
    kept = entry.local.cached_bytes
    assert kept
    its_map, away = map_path(tmp_path, image_inode(entry.number)), tmp_path / "away"
    its_map.rename(away)
    its_map.mkdir()
    async with a_handler(tmp_path, source) as handler:
        image = await handler.fetch_image(entry)
        handler.opened(entry, image)
        assert await image.read(0, len(IMAGE), PATIENCE) == IMAGE
        assert entry.local.cached_bytes == 0
        await trio.sleep(2 * DISK_RETRY_S)
        its_map.rmdir()
        away.rename(its_map)
        await trio.sleep(2 * DISK_RETRY_S)
        assert entry.local.cached_bytes == kept, "what was in it counts again"
        assert await image.read(0, len(IMAGE), PATIENCE) == IMAGE
        await trio.sleep(1)  # the reader is served before the transfer tells what it brought
        assert entry.local.cached_bytes == len(IMAGE)
        await handler.released(entry)


async def test_an_image_that_is_removed_is_not_given_its_chunk_file(
    tmp_path: Path, clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("serving it round the cache: .*Is a directory")
    entry = make_entry(len(IMAGE))
    its_map = map_path(tmp_path, image_inode(entry.number))
    its_map.mkdir()
    async with a_handler(tmp_path) as handler:
        await handler.fetch_image(entry)
        its_map.rmdir()
        await handler.remove_image(entry)
        await trio.sleep(3 * DISK_RETRY_S)
        assert not its_map.exists()

"""What a server takes over from those before it: state database, open lower files, open table (DESIGN, section 2)."""

import logging
import os
import time
from pathlib import Path

import trio

from basefs.cache import reader_table, state_copy
from basefs.cache.reader_table import ReaderTable
from basefs.cache.state_db import StateDatabase
from basefs.catalog.glance_catalog import Catalog
from basefs.concurrency.threads import BlockingCalls
from basefs.core.inodes import first_other_handle, image_number_of
from basefs.fuse import lower_files, open_table
from basefs.fuse.lower import LowerTree
from basefs.fuse.open_table import OpenTable
from basefs.handlers.graduated import HELD_PREFIX as GRADUATED_PREFIX
from basefs.handlers.graduated import GraduatedImages
from basefs.service.keeper_channel import KeeperChannel

log = logging.getLogger(__name__)

LOWER_THREADS_MAX = 16
LISTING_WAIT_S = 2.0
"""For the names in the chunk directory, where the keeper kept a copy of the state database, which has the numbers."""


async def open_database(cache_dir: Path, channel: KeeperChannel) -> StateDatabase:
    """The state database: the file, or what the keeper kept of it.

    Raises:
        CacheError: there is neither.
    """
    held = channel.take(state_copy.KEY)
    numbers_from = 0
    with trio.move_on_after(LISTING_WAIT_S if held else float("inf")):
        numbers_from = await trio.to_thread.run_sync(_highest_number, cache_dir / "chunks", abandon_on_cancel=True)
    return await StateDatabase.open(
        cache_dir / "state.sqlite", numbers_from=numbers_from, held=held[0] if held else None, escrow=channel
    )


async def open_lower_tree(lower_fd: int, channel: KeeperChannel) -> LowerTree:
    """The lower directory, with the files that are open in it."""
    tree = LowerTree(
        lower_fd,
        BlockingCalls("lower", threads_max=LOWER_THREADS_MAX),
        channel,
        first_handle=first_other_handle(time.clock_gettime_ns(time.CLOCK_BOOTTIME)),
    )
    held = channel.take(lower_files.HELD_PREFIX)
    await tree.restore(held)
    if held:
        log.info("%d open lower files go on", len(held))
    return tree


async def open_graduated(
    lower_fd: int, channel: KeeperChannel, nursery: trio.Nursery, catalog: Catalog
) -> GraduatedImages:
    """The images that are read from their file in the lower directory, with those that are open."""
    images = GraduatedImages(
        lower_fd, BlockingCalls("graduated", threads_max=LOWER_THREADS_MAX), channel, nursery, catalog.touch
    )
    await images.restore(channel.take(GRADUATED_PREFIX), catalog.by_number)
    return images


async def open_open_table(channel: KeeperChannel) -> OpenTable:
    """The table of open images, or a new one, which is left with the keeper."""
    after_answer = trio.lowlevel.current_trio_token().run_sync_soon
    for held in channel.take(open_table.KEY):
        try:
            return OpenTable(held.fd, trio.current_time, after_answer)
        except ValueError as exc:
            log.info("the table of open images is begun anew: %s", exc)
        finally:
            os.close(held.fd)
    fd = open_table.new_table()
    try:
        await channel.hold(open_table.KEY, "", fd)
        return OpenTable(fd, trio.current_time, after_answer)
    finally:
        os.close(fd)


async def open_reader_table(channel: KeeperChannel) -> ReaderTable:
    """The table that readers look at, or a new one, which is left with the keeper before any reader has it."""
    for held in channel.take(reader_table.KEY):
        try:
            return ReaderTable(held.fd)
        except ValueError as exc:
            log.info("the table of images that readers serve is begun anew: %s", exc)
            os.close(held.fd)
    fd = reader_table.new_table()
    await channel.hold(reader_table.KEY, "", fd)
    return ReaderTable(fd)


def _highest_number(chunks_dir: Path) -> int:
    """The highest image number that a chunk file was ever made for: it must not be given to another image."""
    try:
        names = os.listdir(chunks_dir)
    except OSError:
        return 0
    numbers = [image_number_of(int(stem)) for stem, _, _ in (name.partition(".") for name in names) if stem.isdecimal()]
    return max((number for number in numbers if number is not None), default=0)

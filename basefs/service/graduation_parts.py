"""The graduator over the service's objects."""

import hashlib
import os

import trio

from basefs import errors
from basefs.cache.state_db import StateDatabase
from basefs.catalog.records import ImageEntry
from basefs.config import Settings
from basefs.fuse.image_files import ImageFiles
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.graduated import GraduatedImages
from basefs.handlers.graduation import GraduationSettings, Graduator
from basefs.handlers.parts import ShownFile, host_name


def build_graduator(
    nursery: trio.Nursery,
    handler: DownloadingTemplateImageHandler,
    graduated: GraduatedImages,
    images: ImageFiles,
    database: StateDatabase,
    settings: Settings,
) -> Graduator:
    """Makes files that have what `images` shows. Its `tidy_up` is to be started; nothing graduates before."""

    def shown(entry: ImageEntry) -> ShownFile:
        attributes = images.attributes(entry)
        return ShownFile(
            size=attributes.st_size,
            uid=attributes.st_uid,
            gid=attributes.st_gid,
            mode=attributes.st_mode & 0o7777,
            atime_ns=attributes.st_atime_ns,
            mtime_ns=attributes.st_mtime_ns,
        )

    return Graduator(
        handler,
        graduated,
        GraduationSettings(
            is_on=settings.graduate,
            chunks_dir=settings.cache_dir / "chunks",
            # What the cache leaves free on its disk is left here, too: guests write their overlays to it.
            reserve_bytes=settings.cache_min_free_bytes,
            host=host_name(),
        ),
        nursery,
        shown=shown,
        stored=database.stored,
    )


async def complete(handler: DownloadingTemplateImageHandler, entry: ImageEntry) -> None:
    """Bring and verify all of the image. BasefsError: why it cannot be had."""
    async with handler.warmer.hold(entry) as warming:
        await warming.done.wait()
    if warming.error is not None:
        raise warming.error
    record = entry.record
    with (await handler.downloaded_image(entry)).fetcher.whole_file() as file:
        if record.os_hash_algo is None:
            entry.local.whole = "no_hash"
        elif await trio.to_thread.run_sync(_hash_of, file.data_fd, record.os_hash_algo) == record.os_hash_value:
            entry.local.whole = "verified"
        else:
            raise errors.SourceCorruptError(f"image {entry.image_id}: its hash is not that which Glance tells")


def _hash_of(fd: int, algorithm: str) -> str:
    digest, offset = hashlib.new(algorithm), 0
    while data := os.pread(fd, 1 << 20, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()

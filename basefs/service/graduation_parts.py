"""The graduator over the service's objects."""

from collections.abc import Awaitable, Callable

import trio

from basefs.catalog.records import ImageEntry
from basefs.config import Settings
from basefs.fuse.image_files import ImageFiles
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.graduated import GraduatedImages
from basefs.handlers.graduation import Graduator
from basefs.handlers.making import GraduationSettings
from basefs.handlers.parts import ShownFile, host_name


def build_graduator(
    nursery: trio.Nursery,
    handler: DownloadingTemplateImageHandler,
    graduated: GraduatedImages,
    images: ImageFiles,
    settings: Settings,
    *,
    stored: Callable[[ImageEntry], Awaitable[None]],
) -> Graduator:
    """Makes files that have what `images` shows. Its `tidy_up` is to be started; nothing graduates before.

    `stored(entry)` returns when what changed of the entry outlives this server.
    """

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
        stored=stored,
    )

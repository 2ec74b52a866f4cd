"""Images as files: attributes, opens, reads, and what may be done to a name that is not really there.

Invariants: a handle means the same to every server (`core/inodes.py`), so reads work on a handle that this
server never gave out, and `opens` knows how many there are. `hits` holds, for handles in use, the function that
answers a read at once; it is an accelerator and may be emptied at any time.
"""

import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import pyfuse3
import trio

from basefs import errors
from basefs.cache.reader_table import ReaderTable, Share
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.core.inodes import image_handle, image_inode, image_of_handle
from basefs.core.names import is_base_name
from basefs.fuse.attributes import BLOCK_BYTES, new_attributes
from basefs.fuse.open_table import OpenTable
from basefs.fuse.told_attributes import ToldAttributes
from basefs.handlers.base import Patience, TemplateImageHandler
from basefs.handlers.gate import ServableGate
from basefs.handlers.report import image_state, link_report
from basefs.reader_attributes import AttributeCells

log = logging.getLogger(__name__)

Hit = Callable[[int, int], "memoryview | bytes | None"]

REMOVE_WAIT_S = 2.0
"""`unlink` waits so long for the local bytes to go; a transfer that does not end sooner is not waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFileSettings:
    """Deadlines, and who owns the files until somebody chowns them."""

    lookup_deadline_s: float
    guest: Patience
    other: Patience
    guest_uids: frozenset[int]
    owner_uid: int
    owner_gid: int


class ImageFiles:
    """The virtual files `<sha1(image id)>`."""

    def __init__(
        self,
        catalog: Catalog,
        gate: ServableGate,
        handler: TemplateImageHandler,
        settings: ImageFileSettings,
        nursery: trio.Nursery,
        opens: OpenTable,
        *,
        stored: Callable[[ImageEntry], Awaitable[None]],
        cells: AttributeCells | None = None,
    ) -> None:
        """`stored(entry)` returns when what changed of the entry outlives this server; removals run in `nursery`.

        `cells`: what readers tell the kernel of images' attributes; None where there are no readers.
        """
        self._catalog = catalog
        self._gate = gate
        self._handler = handler
        self._settings = settings
        self._nursery = nursery
        self._opens = opens
        self._stored = stored
        handler.restore_opens(opens.all_handles())
        self.hits: dict[int, Hit] = {}
        self.told = ToldAttributes(cells, self.attributes)

    # --- names and attributes ---------------------------------------------------------------------------

    async def find(self, name: bytes) -> ImageEntry | None:
        """The image behind a name, if there is one that may be shown. Never asks Glance for what is no image's name.

        Raises:
            ImageRefusedError: it must not be shown.
            SourceUnavailableError, DeadlineExceededError: not to be found out now.
        """
        text = name.decode("ascii", "replace")
        if not is_base_name(text):
            return None
        entry = await self._catalog.resolve(text)
        if entry is not None and entry.local.is_graduated:
            await self._look_for_file(entry)
        if entry is not None and not self._is_let_through(entry):
            await self._gate.let_through(entry, deadline_s=self._settings.lookup_deadline_s)
        return entry

    def _is_let_through(self, entry: ImageEntry) -> bool:
        """Whether the gate let somebody through who has it open still, and it is known how large it was shown.

        One that became a lower file was let through before that, and is a matter of nova's from then on.
        """
        if entry.local.is_graduated:
            return True
        return self._handler.open_handles(entry) > 0 and self._gate.knows_view(entry)

    async def lower_removed(self, name: bytes) -> None:
        """The lower directory's file of that name was removed or renamed. Never fails.

        Was it an image's, made by us, that is a lazy image again, as after `unlink`.
        """
        entry = self._catalog.by_base_name(name.decode("ascii", "replace"))
        if entry is not None and entry.local.is_graduated:
            with suppress(errors.LowerFileError):  # the next look-up of the name finds it out
                await self._look_for_file(entry)

    async def _look_for_file(self, entry: ImageEntry) -> None:
        if await self._handler.is_lazy_again(entry):
            entry.local.used_at_ns = entry.local.mtime_ns = entry.local.atime_ns = None
            await self._stored(entry)

    async def wait_known(self) -> None:
        """See `Catalog.wait_known`."""
        await self._catalog.wait_known()

    def entry_of(self, number: int) -> ImageEntry:
        """The image with this number.

        Raises:
            NoSuchEntryError: there is none.
        """
        entry = self._catalog.by_number(number)
        if entry is None:
            raise errors.NoSuchEntryError(f"no image has the number {number}")
        return entry

    def attributes(self, entry: ImageEntry) -> pyfuse3.EntryAttributes:
        """What `stat` shows. Without local state the mtime is "now": nova's cache manager must not take it for old."""
        local = entry.local
        now_ns = time.time_ns()
        used_at_ns = now_ns if local.used_at_ns is None else local.used_at_ns
        mtime_ns = used_at_ns if local.mtime_ns is None else local.mtime_ns
        attributes = new_attributes(
            image_inode(entry.number), stat.S_IFREG | (0o644 if local.mode is None else local.mode), mtime_ns
        )
        attributes.st_uid = self._settings.owner_uid if local.uid is None else local.uid
        attributes.st_gid = self._settings.owner_gid if local.gid is None else local.gid
        attributes.st_size = entry.shown_size
        attributes.st_blocks = -(-local.cached_bytes // BLOCK_BYTES)
        if local.atime_ns is not None:
            attributes.st_atime_ns = local.atime_ns
        return attributes

    def listed(self, *, is_nova: bool) -> list[ImageEntry]:
        """The images that `ls` shows, by number: all servable ones, but to nova only what has local state."""
        return [
            entry
            for entry in self._catalog.entries()
            if (entry.local.used_at_ns is not None or not is_nova) and self._gate.verdict(entry).state != "refused"
        ]

    def listing_attributes(self, entry: ImageEntry) -> pyfuse3.EntryAttributes:
        """As `attributes`, but the kernel asks again before it resolves the name of an unchecked image."""
        attributes = self.attributes(entry)
        if self._gate.verdict(entry).state != "servable":
            attributes.entry_timeout = attributes.attr_timeout = 0.0
        return attributes

    async def set_attributes(
        self, entry: ImageEntry, attributes: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields
    ) -> None:
        """Remember times, owner and mode. A utime on an image with no local state is nova's pre-cache call: warm it.

        Raises:
            ReadOnlyError: the size was to be changed.
        """
        if fields.update_size:
            raise errors.ReadOnlyError(f"image {entry.image_id}: its size cannot be changed")
        local = entry.local
        if fields.update_mode:
            local.mode = stat.S_IMODE(attributes.st_mode)
        if fields.update_uid:
            local.uid = attributes.st_uid
        if fields.update_gid:
            local.gid = attributes.st_gid
        if fields.update_atime:
            local.atime_ns = attributes.st_atime_ns
        if fields.update_mtime:
            if local.used_at_ns is None:
                local.used_at_ns = time.time_ns()
                self._handler.warm(entry)
            local.mtime_ns = attributes.st_mtime_ns
        await self._stored(entry)

    def xattrs(self, entry: ImageEntry) -> dict[bytes, bytes]:
        """What `getfattr -d` shows."""
        source = entry.local.source_kind or "unknown"
        if entry.local.source_reason:
            source = f"{source}: {entry.local.source_reason}"
        link = link_report(entry, self._handler)
        return {
            b"user.basefs.image_id": entry.image_id.encode(),
            b"user.basefs.name": entry.record.name.encode("utf-8", "replace"),
            b"user.basefs.state": image_state(entry, self._gate, self._handler).encode(),
            b"user.basefs.cached_bytes": str(entry.local.cached_bytes).encode(),
            b"user.basefs.source": source.encode("utf-8", "replace"),
            **{
                b"user.basefs." + name.encode(): str(link[name]).encode("utf-8", "replace")
                for name in ("volume_id", "clone_id", "attachment_id", "connector", "device")
                if link[name] is not None
            },
        }

    # --- open files -------------------------------------------------------------------------------------

    async def open_image(self, entry: ImageEntry, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """A handle for reading. Does no slow work: a process inside open(2) cannot be killed.

        Raises:
            ReadOnlyError: it was to be opened for writing.
            BasefsError: it cannot be shown.
        """
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise errors.ReadOnlyError(f"image {entry.image_id} is read-only")
        if not self._is_let_through(entry):
            await self._gate.let_through(entry, deadline_s=self._settings.lookup_deadline_s)
        if entry.local.used_at_ns is None:
            entry.local.used_at_ns = time.time_ns()
            await self._stored(entry)
        image = await self._handler.fetch_image(entry)
        is_guest = self._is_guest(ctx)
        # Nothing is awaited from here to the answer (`OpenTable`).
        if self._opens.opened(entry.number, is_guest=is_guest, thread_id=ctx.pid):
            self._handler.opened(entry, image)
        handle = image_handle(entry.number, is_guest=is_guest)
        self.hits[handle] = image.hit
        self.told.tell(entry)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=True)

    def _is_guest(self, ctx: pyfuse3.RequestContext) -> bool:
        if ctx.uid in self._settings.guest_uids:
            return True
        try:
            program = os.readlink(f"/proc/{ctx.pid}/exe")
        except OSError:
            return False
        return os.path.basename(program).startswith(("qemu-system-", "qemu-kvm"))

    async def read(self, handle: int, offset: int, size: int) -> bytes | memoryview:
        """What `[offset, offset + size)` holds up to the end of the image: all of it, or an error.

        Raises:
            BasefsError: why the bytes did not come in time.
        """
        number, is_guest = self._of_handle(handle)
        entry = self.entry_of(number)
        image = await self._handler.fetch_image(entry)
        if self.hits.get(handle) != image.hit:
            # The handle is from an earlier server, or the image was closed since: make it known again.
            if not self._opens.has(number, is_guest=is_guest):
                self._opens.learned(number, is_guest=is_guest)
                self._handler.opened(entry, image)
            self.hits[handle] = image.hit
        wanted = max(0, min(size, image.size - offset))
        data = await image.read(offset, size, self._settings.guest if is_guest else self._settings.other)
        if len(data) != wanted:
            raise errors.InternalError(f"image {entry.image_id}: {len(data)} bytes for {wanted} at {offset}")
        return data

    async def share(self, number: int, table: ReaderTable, offset: int, size: int) -> Share | None:
        """What reader processes serve hits of an image with that was just read there; None where they cannot.

        Raises:
            BasefsError: it cannot be prepared any more.
        """
        return (await self._handler.fetch_image(self.entry_of(number))).share(table, offset, size)

    def release(self, handle: int) -> None:
        """One handle fewer; after the last one of an unlinked image its local bytes are dropped.

        Nothing is awaited before the answer (`OpenTable`), so what takes time comes after it.
        """
        number, is_guest = self._of_handle(handle)
        entry = self._catalog.by_number(number)
        if not self._opens.released(number, is_guest=is_guest) or entry is None:
            return
        if not self._opens.has(number, is_guest=is_guest):
            self.hits.pop(handle, None)
        self._nursery.start_soon(self._released, entry)

    async def _released(self, entry: ImageEntry) -> None:
        """Ends soon; `_remove` bounds it."""
        await self._handler.released(entry)
        if not self._handler.open_handles(entry) and entry.number in self._opens.unlinked():
            await self._remove(entry)

    async def remove_left_over(self) -> None:
        """Drop the bytes of unlinked images that a server was killed over at their last close. Once, at the start."""
        for number in self._opens.unlinked():
            entry = self._catalog.by_number(number)
            if entry is None:
                self._opens.set_unlinked(number, is_unlinked=False)
            elif not self._handler.open_handles(entry):
                await self._remove(entry)

    def _of_handle(self, handle: int) -> tuple[int, bool]:
        found = image_of_handle(handle)
        if found is None:
            raise errors.BadHandleError(f"no such handle: {handle}")
        return found

    # --- unlink -----------------------------------------------------------------------------------------

    async def unlink(self, entry: ImageEntry) -> None:
        """Drop the local bytes, now or at the last close. Never fails; the name stays, Glance keeps the image.

        Those of a pinned image stay: pins are for what nova's cache manager takes for unused.
        """
        local = entry.local
        local.used_at_ns = local.mtime_ns = local.atime_ns = None
        local.is_wanted = False
        await self._stored(entry)
        if local.pinned:
            return
        if self._handler.open_handles(entry):
            self._opens.set_unlinked(entry.number, is_unlinked=True)
        else:
            await self._remove(entry)

    async def _remove(self, entry: ImageEntry) -> None:
        try:
            if not entry.local.pinned:  # it may have been pinned between unlink and the last close
                with trio.move_on_after(REMOVE_WAIT_S):
                    await self._handler.remove_image(entry)
        except errors.CacheError as exc:
            # What stays is right still, and found again by its checksums; nova would log an error for ever.
            log.warning("image %s: its local bytes were not removed: %s", entry.image_id, exc)
        if not self._handler.open_handles(entry):
            self._opens.set_unlinked(entry.number, is_unlinked=False)

"""The FUSE face: hands each request to the half that owns the inode. `edge` catches whatever comes out.

A lower file always wins over a virtual one of the same name. Nothing here waits for slow work but `read`.
"""

from collections import Counter
from collections.abc import Sequence

import pyfuse3
import trio

from basefs import errors
from basefs.core import inodes
from basefs.fuse.directories import Directories
from basefs.fuse.errno_edge import edge
from basefs.fuse.image_files import ImageFiles
from basefs.fuse.listing_page import Token
from basefs.fuse.lower import LowerTree
from basefs.fuse.request_stats import RequestStats
from basefs.fuse.virtual_tree import BASEFS_NAME, VirtualTree

REMOVED_LIMIT_S = 1.0
"""What is not found out by then of an image whose lower file went is found out when it is looked up."""


class Operations(pyfuse3.Operations):
    """Answers the kernel. `requests` and `stats` count them by kind."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, lower: LowerTree, images: ImageFiles, virtual: VirtualTree, directories: Directories) -> None:
        super().__init__()
        self._lower = lower
        self._images = images
        self._virtual = virtual
        self._directories = directories
        self._hits = images.hits
        self._lower_hits = lower.hits
        self.requests: Counter[str] = Counter()
        self.stats = RequestStats()
        self.hits = 0
        """Reads of images answered at once; not in `requests`, nor in `stats`."""
        self.hit_bytes = 0
        self.lower_hits = 0
        """The same of lower files."""
        self.misses = 0
        """Reads of images that had to wait: for bytes from Glance, for a check, or for the cache disk."""

    # --- reading: the hit path comes first ----------------------------------------------------------------

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """All bytes up to the end of the file, or an error; see `ChunkFile.hit` and `LowerFiles` for most reads."""
        data = self.hit(fh, off, size)
        if data is not None:
            return data  # type: ignore[return-value]  # pyfuse3 takes any buffer, and copies it at once
        return await self._read(fh, off, size)

    def hit(self, fh: int, off: int, size: int) -> memoryview | bytes | None:
        """What a read gives if it can be answered at once, valid until the next await; else None."""
        hit = self._hits.get(fh)
        if hit is not None:
            data = hit(off, size)
            if data is not None:
                self.hits += 1
                self.hit_bytes += len(data)
                return data
        elif (hit := self._lower_hits.get(fh)) is not None and (data := hit(off, size)) is not None:
            self.lower_hits += 1
            return data
        return None

    @edge
    async def _read(self, fh: int, off: int, size: int) -> bytes:
        self.requests["read"] += 1
        if inodes.image_of_handle(fh) is not None:
            self.misses += 1
            return await self._images.read(fh, off, size)  # type: ignore[return-value]  # any buffer
        if self._virtual.owns_handle(fh):
            return self._virtual.read(fh, off, size)
        return await self._lower.read(fh, off, size)

    # --- names -------------------------------------------------------------------------------------------

    @edge
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """The lower file of that name, else the virtual one."""
        self.requests["lookup"] += 1
        if self._virtual.owns(parent_inode):
            return self._virtual.lookup(parent_inode, name)
        if parent_inode == inodes.ROOT and name == BASEFS_NAME:
            return self._virtual.attributes(inodes.BASEFS_DIR)
        found = await self._lower.lookup(parent_inode, name)
        if found is not None:
            return found
        entry = await self._images.find(name) if parent_inode == inodes.ROOT else None
        if entry is None:
            raise errors.NoSuchEntryError(f"no entry {name!r}")
        return self._images.attributes(entry)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Only files of the lower directory are counted."""
        await self._forget([(inode, count) for inode, count in inode_list if inodes.is_lower(inode)])

    @edge
    async def _forget(self, counts: list[tuple[int, int]]) -> None:
        if counts:
            await self._lower.forget(counts)

    @edge
    async def unlink(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        """A lower file is removed; an image loses its local bytes and keeps its name."""
        self.requests["unlink"] += 1
        self._check_writable(parent_inode, name)
        try:
            await self._lower.unlink(parent_inode, name)
            await self._lower_removed(parent_inode, name)
        except errors.NoSuchEntryError:
            entry = await self._images.find(name) if parent_inode == inodes.ROOT else None
            if entry is None:
                raise
            await self._images.unlink(entry)

    @edge
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """Rename a lower file, also onto a virtual name, which it then hides."""
        self.requests["rename"] += 1
        self._check_writable(parent_inode_old, name_old)
        self._check_writable(parent_inode_new, name_new)
        try:
            await self._lower.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)
            await self._lower_removed(parent_inode_old, name_old)
        except errors.NoSuchEntryError:
            for parent, name in ((parent_inode_old, name_old), (parent_inode_new, name_new)):
                if parent == inodes.ROOT and await self._images.find(name) is not None:
                    raise errors.ReadOnlyError(f"image {name!r} cannot be renamed or exchanged") from None
            raise

    async def _lower_removed(self, parent_inode: int, name: bytes) -> None:
        """A lower file has lost its name. Cancellation: not here, for what is done and not answered is done twice."""
        if parent_inode == inodes.ROOT:
            with trio.move_on_after(REMOVED_LIMIT_S, shield=True):
                await self._images.lower_removed(name)

    def _check_writable(self, parent_inode: int, name: bytes) -> None:
        if self._virtual.owns(parent_inode) or (parent_inode == inodes.ROOT and name == BASEFS_NAME):
            raise errors.ReadOnlyError(".basefs is read-only")

    @edge
    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """A directory below."""
        self._check_writable(parent_inode, name)
        return await self._lower.mkdir(parent_inode, name, mode, ctx)

    @edge
    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        """Remove a directory below."""
        self._check_writable(parent_inode, name)
        await self._lower.rmdir(parent_inode, name)

    @edge
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """A file, FIFO or socket below."""
        self._check_writable(parent_inode, name)
        return await self._lower.mknod(parent_inode, name, mode, rdev, ctx)

    @edge
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """A link below."""
        self._check_writable(parent_inode, name)
        return await self._lower.symlink(parent_inode, name, target, ctx)

    @edge
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """A further name of a lower file."""
        self._check_writable(new_parent_inode, new_name)
        if not inodes.is_lower(inode):
            raise errors.NotSupportedError("a virtual file has one name")
        return await self._lower.link(inode, new_parent_inode, new_name)

    @edge
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        """Where a link points."""
        if inodes.is_lower(inode):
            return pyfuse3.FileNameT(await self._lower.readlink(inode))
        return pyfuse3.FileNameT(self._virtual.link_target(inode))

    # --- attributes ---------------------------------------------------------------------------------------

    @edge
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """What `stat` shows."""
        self.requests["getattr"] += 1
        number = inodes.image_number_of(inode)
        if number is not None:
            return self._images.told.tell(self._images.entry_of(number))
        if self._virtual.owns(inode):
            return self._virtual.attributes(inode)
        return await self._lower.getattr(inode)

    @edge
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """A lower file is changed; an image remembers times, owner and mode."""
        self.requests["setattr"] += 1
        number = inodes.image_number_of(inode)
        if number is not None:
            entry = self._images.entry_of(number)
            await self._images.set_attributes(entry, attr, fields)
            return self._images.attributes(entry)
        if self._virtual.owns(inode):
            raise errors.ReadOnlyError(".basefs is read-only")
        return await self._lower.setattr(inode, attr, fields, fh, ctx)

    @edge
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        """`user.basefs.*` of an image; a lower file's own."""
        self.requests["getxattr"] += 1
        value = self._xattrs(inode)
        if value is None:
            return await self._lower.getxattr(inode, name)
        if name not in value:
            raise errors.NoSuchAttributeError(f"no attribute {name!r}")
        return value[name]

    @edge
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> list[pyfuse3.XAttrNameT]:
        """The names of the extended attributes."""
        value = self._xattrs(inode)
        names = await self._lower.listxattr(inode, ctx) if value is None else value
        return [pyfuse3.XAttrNameT(name) for name in names]

    @edge
    async def setxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """Only on lower files."""
        if self._xattrs(inode) is not None:
            raise errors.NotSupportedError("a virtual file keeps no extended attributes")
        await self._lower.setxattr(inode, name, value)

    @edge
    async def removexattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> None:
        """Only on lower files."""
        if self._xattrs(inode) is not None:
            raise errors.NotSupportedError("a virtual file keeps no extended attributes")
        await self._lower.removexattr(inode, name)

    def _xattrs(self, inode: int) -> dict[bytes, bytes] | None:
        """Those of a virtual file; None for one of the lower directory."""
        number = inodes.image_number_of(inode)
        if number is not None:
            return self._images.xattrs(self._images.entry_of(number))
        return {} if self._virtual.owns(inode) else None

    @edge
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """The lower file system's numbers."""
        self.requests["statfs"] += 1
        return await self._lower.statfs()

    # --- open files -----------------------------------------------------------------------------------------

    @edge
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """A handle."""
        self.requests["open"] += 1
        number = inodes.image_number_of(inode)
        if number is not None:
            return await self._images.open_image(self._images.entry_of(number), flags, ctx)
        if self._virtual.owns(inode):
            return await self._virtual.open(inode, flags)
        return self._lower_file(await self._lower.open(inode, flags))

    @edge
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """A new lower file."""
        self.requests["create"] += 1
        self._check_writable(parent_inode, name)
        handle, attributes = await self._lower.create(parent_inode, name, mode, flags, ctx)
        return self._lower_file(handle), attributes

    def _lower_file(self, handle: int) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=self._lower.may_keep_pages)

    @edge
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Only lower files are ever open for writing."""
        self.requests["write"] += 1
        return await self._lower.write(fh, off, buf)

    @edge
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """An opener closes its file."""
        if not self._is_virtual(fh):
            await self._lower.flush(fh)

    @edge
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """A lower file is on the disk."""
        if not self._is_virtual(fh):
            await self._lower.fsync(fh, datasync=datasync)

    @edge
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """The last opener of the handle is gone."""
        self.requests["release"] += 1
        if inodes.image_of_handle(fh) is not None:
            self._images.release(fh)
        elif self._virtual.owns_handle(fh):
            await self._virtual.release(fh)
        else:
            await self._lower.release(fh)

    def _is_virtual(self, handle: int) -> bool:
        return inodes.image_of_handle(handle) is not None or self._virtual.owns_handle(handle)

    # --- directories ----------------------------------------------------------------------------------------

    @edge
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """A handle for a listing."""
        self.requests["opendir"] += 1
        return pyfuse3.FileHandleT(self._directories.open(inode, ctx))

    @edge
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: Token) -> None:
        """One page of a listing."""
        self.requests["readdir"] += 1
        await self._directories.read(fh, start_id, token)

    @edge
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """The listing is over."""
        self._directories.release(fh)

    @edge
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """The names of a lower directory are on the disk."""
        inode = fh if inodes.is_lower(fh) else fh >> 1
        if not self._virtual.owns(inode):
            await self._lower.fsyncdir(inode)

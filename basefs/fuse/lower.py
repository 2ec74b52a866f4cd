"""The pass-through half of the face: the lower directory, read and write, as the kernel asks for it.

Owned by the trio loop; every call on the lower file system runs in a thread, except reads of bytes that are in
memory. A lookup count is raised last, with nothing awaited between that and the return, so a cancelled request
is one that was never counted. Errors: NoSuchEntryError, BadHandleError, LowerFileError, NotSupportedError,
NoSuchAttributeError. Permissions are the kernel's business (`default_permissions`).
"""

import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence

import pyfuse3

from basefs import errors
from basefs.cache.renames import rename_with_flags
from basefs.concurrency.threads import BlockingCalls
from basefs.core.escrow import Escrow, HeldFd
from basefs.fuse import lower_disk as disk
from basefs.fuse import lower_xattrs as xattrs
from basefs.fuse.lower_attributes import attribute_change, creator, statvfs_data
from basefs.fuse.lower_calls import LowerCalls
from basefs.fuse.lower_files import Hit, LowerFiles
from basefs.fuse.lower_holding import LowerInodes
from basefs.fuse.lower_syscalls import stays_in_memory

# A READDIR takes about 160 entries at most; the fds of one batch are opened in one call in a thread.
_BATCH_NAMES = 64

Reply = Callable[[bytes, pyfuse3.EntryAttributes, int], bool]


def checked_name(name: bytes) -> bytes:
    """A name that can only mean an entry of the directory itself; NoSuchEntryError for any other."""
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise errors.NoSuchEntryError(f"{name!r} names no entry")
    return name


class LowerTree:
    """The lower directory. Inode 1 is its root, every other is `2**63 | st_ino`."""

    def __init__(
        self, root_fd: int, blocking: BlockingCalls, escrow: Escrow, *, first_handle: int, timeout_s: float = 1.0
    ) -> None:
        """`root_fd`: any fd on the lower directory, opened before the mount; it stays the caller's.

        Open files are left in `escrow`. Handles count up from `first_handle`. The kernel may keep names and attributes
        for `timeout_s`.
        """
        self._calls = LowerCalls(blocking, status_in_memory=stays_in_memory(root_fd))
        self._inodes = LowerInodes(root_fd, self._calls, timeout_s=timeout_s)
        self._files = LowerFiles(self._calls, escrow, self._inodes.table.closed, first_handle=first_handle)

    @property
    def known_inodes(self) -> int:
        """Inodes the kernel holds, besides the root; each costs an fd."""
        return len(self._inodes.table)

    @property
    def lookups(self) -> int:
        """The sum of the lookup counts."""
        return self._inodes.table.lookups

    @property
    def open_files(self) -> int:
        """Handles that were not released; each costs an fd."""
        return len(self._files)

    @property
    def may_keep_pages(self) -> bool:
        """Whether the kernel may keep a file's pages from one open to the next (`FileInfo.keep_cache`).

        Not where another host may have written to the file meanwhile.
        """
        return self._calls.status_in_memory

    async def restore(self, held: Sequence[HeldFd]) -> None:
        """Goes on with the open files of the server before, whose fds are ours from here.

        Their nodes are known by them, also where they have no name. The lookup counts stay the kernel's own secret.
        """
        found = await self._calls.run(disk.find_open, [one.fd for one in held])
        for one, (path_fd, status) in zip(held, found, strict=True):
            self._files.restore(one, self._inodes.adopt(path_fd, status, lookups=0))

    async def close(self) -> None:
        """Closes every fd, after the last request. What is in escrow is the next server's."""
        await self._calls.run(disk.close_all, self._files.clear() + self._inodes.table.clear())

    # --- names ------------------------------------------------------------------------------------

    async def lookup(self, parent_inode: int, name: bytes) -> pyfuse3.EntryAttributes | None:
        """The entry, counted as known to the kernel; None if the name is not there."""
        with await self._inodes.held(parent_inode) as parent:
            try:
                found = await self._calls.find_name(parent.fd, checked_name(name))
            except errors.NoSuchEntryError:
                return None
        return self._told(*found)

    async def forget(self, counts: list[tuple[int, int]]) -> None:
        """The kernel drops (inode, lookups) pairs. Unknown inodes are ignored."""
        await self._inodes.forget(counts)

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """A new directory, the caller's."""
        with await self._inodes.held(parent_inode) as parent:
            found = await self._calls.run(disk.make_directory, parent.fd, checked_name(name), creator(mode, ctx))
        return self._told(*found)

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """A new regular file, FIFO, socket or device, the caller's."""
        with await self._inodes.held(parent_inode) as parent:
            found = await self._calls.run(disk.make_node, parent.fd, checked_name(name), rdev, creator(mode, ctx))
        return self._told(*found)

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """A new symbolic link, the caller's. Its target is never followed here."""
        with await self._inodes.held(parent_inode) as parent:
            found = await self._calls.run(disk.make_symlink, parent.fd, checked_name(name), target, creator(0, ctx))
        return self._told(*found)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes) -> pyfuse3.EntryAttributes:
        """A further name for an inode."""
        with await self._inodes.held(inode) as node, await self._inodes.held(new_parent_inode) as parent:
            found = await self._calls.run(disk.make_link, node.fd, parent.fd, checked_name(new_name))
        return self._told(*found)

    async def unlink(self, parent_inode: int, name: bytes) -> None:
        """Removes a name that is no directory."""
        with await self._inodes.held(parent_inode) as parent:
            await self._calls.run(disk.remove_file, parent.fd, checked_name(name))

    async def rmdir(self, parent_inode: int, name: bytes) -> None:
        """Removes an empty directory."""
        with await self._inodes.held(parent_inode) as parent:
            await self._calls.run(disk.remove_directory, parent.fd, checked_name(name))

    async def rename(
        self, old_parent_inode: int, old_name: bytes, new_parent_inode: int, new_name: bytes, flags: int
    ) -> None:
        """Renames; `flags` as renameat2(2) has them (RENAME_NOREPLACE, RENAME_EXCHANGE)."""
        with await self._inodes.held(old_parent_inode) as old, await self._inodes.held(new_parent_inode) as new:
            await self._calls.run(
                rename_with_flags, old.fd, checked_name(old_name), new.fd, checked_name(new_name), flags
            )

    async def list_names(self, inode: int) -> list[bytes]:
        """The names in a directory now, without `.` and `..`, to be told by `reply_names`."""
        with await self._inodes.held(inode) as node:
            return await self._calls.run(disk.list_directory, node.fd)

    async def reply_names(self, parent_inode: int, names: Sequence[tuple[int, bytes]], reply: Reply) -> bool:
        """Answers a READDIR: calls `reply(name, attributes, next_id)` for each (next_id, name) that is still there.

        True when all were taken, False when `reply` said that the buffer is full. Attributes are read now, not when
        the directory was opened: the kernel takes them for the newest and would cut a file that grew meanwhile.
        Each entry taken counts as a lookup.
        """
        anything_taken = False
        with await self._inodes.held(parent_inode) as parent:
            for start in range(0, len(names), _BATCH_NAMES):
                batch = names[start : start + _BATCH_NAMES]
                try:
                    found = await self._calls.run(disk.find_names, parent.fd, [name for _, name in batch])
                except errors.BasefsError:
                    if anything_taken:
                        # Counted entries must reach the kernel; it asks on from here and then gets the error.
                        return False
                    raise
                next_ids = {name: next_id for next_id, name in batch}
                for taken, (name, fd, status) in enumerate(found):
                    if self._inodes.table.clashes(status):
                        os.close(fd)
                        continue
                    if not reply(name, self._inodes.entry(fd, status), next_ids[name]):
                        disk.close_all([fd for _, fd, _ in found[taken:]])
                        return False
                    self._inodes.adopt(fd, status)
                    anything_taken = True
        return True

    def _told(self, fd: int, status: os.stat_result) -> pyfuse3.EntryAttributes:
        node = self._inodes.adopt(fd, status)
        return self._inodes.entry(node.fd, status)

    # --- attributes -------------------------------------------------------------------------------

    async def getattr(self, inode: int) -> pyfuse3.EntryAttributes:
        """The attributes now."""
        with await self._inodes.held(inode) as node:
            status = await self._calls.status(node.fd)
            node.note(status)
            return self._inodes.attributes(status)

    async def setattr(
        self,
        inode: int,
        attributes: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        handle: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Sets what `fields` name; the new attributes. `handle`: the open file truncated, if by ftruncate(2)."""
        change = attribute_change(attributes, fields, ctx)
        with contextlib.ExitStack() as held:
            file_fd = None
            if handle is not None and change.size is not None:
                file = held.enter_context(self._files.pinned(handle))
                file_fd = file.fd if file.writable else None
            node = held.enter_context(await self._inodes.held(inode))
            status = await self._calls.run(disk.change_attributes, node.fd, file_fd, change)
            node.note(status)
            return self._inodes.attributes(status)

    async def readlink(self, inode: int) -> bytes:
        """The target of a symbolic link."""
        with await self._inodes.held(inode) as node:
            return await self._calls.run(disk.read_link, node.fd)

    async def statfs(self) -> pyfuse3.StatvfsData:
        """The lower file system's numbers."""
        return statvfs_data(await self._calls.run(os.fstatvfs, self._inodes.table.root.fd))

    async def getxattr(self, inode: int, name: bytes) -> bytes:
        """An extended attribute's value. NoSuchAttributeError if it is not there."""
        with await self._inodes.held(inode) as node:
            if name == xattrs.CAPABILITY and node.lacks_capability:
                raise errors.NoSuchAttributeError("the file has no capabilities")
            try:
                return await self._calls.run(xattrs.get_attribute, node.fd, name)
            except errors.NoSuchAttributeError:
                # The kernel asks for this one before every write(2); only through us can it be set meanwhile.
                if name == xattrs.CAPABILITY and node.lacks_capability is None and self._calls.status_in_memory:
                    node.lacks_capability = True
                raise

    async def setxattr(self, inode: int, name: bytes, value: bytes) -> None:
        """Creates or replaces an extended attribute. NotSupportedError for POSIX ACLs."""
        with await self._inodes.held(inode) as node:
            if name == xattrs.CAPABILITY:
                node.lacks_capability = False
            await self._calls.run(xattrs.set_attribute, node.fd, name, value)

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """The names of the extended attributes that the caller may see."""
        with await self._inodes.held(inode) as node:
            return await self._calls.run(xattrs.list_attributes, node.fd, ctx.uid == 0)

    async def removexattr(self, inode: int, name: bytes) -> None:
        """Removes an extended attribute. NoSuchAttributeError if it is not there."""
        with await self._inodes.held(inode) as node:
            await self._calls.run(xattrs.remove_attribute, node.fd, name)

    # --- open files -------------------------------------------------------------------------------

    async def open(self, inode: int, flags: int) -> int:
        """A handle on a regular file. O_TRUNC empties it; flags that concern only the opener's side are dropped."""
        self._files.check_room()
        with await self._inodes.held(inode) as node:
            fd, status = await self._calls.run(disk.open_inode, node.fd, flags)
            node.note(status)
            return self._files.know(await self._files.leave(fd, flags), fd, flags, node)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[int, pyfuse3.EntryAttributes]:
        """A new regular file, the caller's, opened: its handle and its entry, counted as known to the kernel."""
        self._files.check_room()
        with await self._inodes.held(parent_inode) as parent:
            fd, path_fd, status = await self._calls.run(
                disk.create_file, parent.fd, checked_name(name), flags, creator(mode, ctx)
            )
        try:
            handle = await self._files.leave(fd, flags)
        except errors.BasefsError:
            os.close(path_fd)
            raise
        try:
            node = self._inodes.adopt(path_fd, status)
        except errors.BasefsError:
            await self._files.abandon(handle, fd)
            raise
        return self._files.know(handle, fd, flags, node), self._inodes.entry(node.fd, status)

    @property
    def hits(self) -> Mapping[int, Hit]:
        """By handle: what reads at once; `read` is for what it does not give. See LowerFiles."""
        return self._files.hits

    def shared_fd(self, handle: int) -> int | None:
        """The fd of an open file for reader processes; None where there is none, or its file system cannot tell."""
        return self._files.find(handle).fd if handle in self._files.hits else None

    def when_released(self, call: Callable[[int], None]) -> None:
        """See LowerFiles.released."""
        self._files.released = call

    def read(self, handle: int, offset: int, size: int) -> Awaitable[bytes]:
        """See LowerFiles.read."""
        return self._files.read(handle, offset, size)

    def write(self, handle: int, offset: int, data: bytes) -> Awaitable[int]:
        """See LowerFiles.write."""
        return self._files.write(handle, offset, data)

    async def flush(self, handle: int) -> None:
        """An opener closes the file."""
        await self._files.flush(handle)

    async def fsync(self, handle: int, *, datasync: bool) -> None:
        """The file is on the disk."""
        await self._files.fsync(handle, datasync=datasync)

    async def fsyncdir(self, inode: int) -> None:
        """The names in a directory are on the disk."""
        with await self._inodes.held(inode) as node:
            await self._calls.run(disk.sync_directory, node.fd)

    async def release(self, handle: int) -> None:
        """The last opener closed the file."""
        await self._files.release(handle)

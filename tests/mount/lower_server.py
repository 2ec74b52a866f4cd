"""Mounts a LowerTree alone over a directory: the child process of the lower mount tests.

    lower_server.py DIRECTORY READY_FD

One byte on READY_FD says that the mount answers. Ends with the mount. Reading the xattr `user.gauges` of the mount's
root gives [known inodes, lookups, open files]; `user.gauges.empty` waits until all are 0. A file whose name begins
with `appears.` is made by "another host" just before it is created.
"""

import contextlib
import errno
import json
import logging
import os
import sys
from typing import Any

import pyfuse3
import trio

from basefs import errors
from basefs.concurrency.threads import BlockingCalls
from basefs.fuse.lower import LowerTree
from tests.fakes.escrow import MemoryEscrow

EMPTY_DEADLINE_S = 20
FIRST_HANDLE = 1 << 62


def errno_of(error: errors.BasefsError) -> int:
    if isinstance(error, errors.LowerFileError):
        return error.os_error.errno or errno.EIO
    return {
        errors.NoSuchEntryError: errno.ENOENT,
        errors.NoSuchAttributeError: errno.ENODATA,
        errors.NotSupportedError: errno.EOPNOTSUPP,
        errors.BadHandleError: errno.EBADF,
    }[type(error)]


class Answers:
    """Turns our errors into the kernel's."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, errors.BasefsError):
            raise pyfuse3.FUSEError(errno_of(error)) from error


ANSWERS = Answers()


class LowerOnly(pyfuse3.Operations):
    """Every request goes to the tree."""

    supports_dot_lookup = False

    def __init__(self, tree: LowerTree) -> None:
        super().__init__()
        self.tree = tree
        self.changed = trio.Event()
        self.closings = 0
        self.listings: dict[int, tuple[int, list[bytes]]] = {}

    @contextlib.contextmanager
    def closing(self):
        """Counts calls that close files in a thread, after the tables are empty already."""
        self.closings += 1
        try:
            yield
        finally:
            self.closings -= 1
            self.changed.set()
            self.changed = trio.Event()

    def gauges(self) -> list[int]:
        return [self.tree.known_inodes, self.tree.lookups, self.tree.open_files]

    async def lookup(self, parent_inode, name, ctx):
        with ANSWERS:
            entry = await self.tree.lookup(parent_inode, name)
        if entry is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return entry

    async def forget(self, inode_list):
        with self.closing():
            await self.tree.forget(inode_list)

    async def getattr(self, inode, ctx):
        with ANSWERS:
            return await self.tree.getattr(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        with ANSWERS:
            return await self.tree.setattr(inode, attr, fields, fh, ctx)

    async def readlink(self, inode, ctx):
        with ANSWERS:
            return await self.tree.readlink(inode)

    async def mknod(self, parent_inode, name, mode, rdev, ctx):
        with ANSWERS:
            return await self.tree.mknod(parent_inode, name, mode, rdev, ctx)

    async def mkdir(self, parent_inode, name, mode, ctx):
        with ANSWERS:
            return await self.tree.mkdir(parent_inode, name, mode, ctx)

    async def unlink(self, parent_inode, name, ctx):
        with ANSWERS:
            await self.tree.unlink(parent_inode, name)

    async def rmdir(self, parent_inode, name, ctx):
        with ANSWERS:
            await self.tree.rmdir(parent_inode, name)

    async def symlink(self, parent_inode, name, target, ctx):
        with ANSWERS:
            return await self.tree.symlink(parent_inode, name, target, ctx)

    async def rename(self, parent_old, name_old, parent_new, name_new, flags, ctx):
        with ANSWERS:
            await self.tree.rename(parent_old, name_old, parent_new, name_new, flags)

    async def link(self, inode, new_parent_inode, new_name, ctx):
        with ANSWERS:
            return await self.tree.link(inode, new_parent_inode, new_name)

    async def open(self, inode, flags, ctx):
        with ANSWERS:
            return pyfuse3.FileInfo(fh=await self.tree.open(inode, flags), keep_cache=self.tree.may_keep_pages)

    async def create(self, parent_inode, name, mode, flags, ctx):
        if name.startswith(b"appears."):
            parent = self.tree._inodes.table.find(parent_inode)
            fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=parent.fd)
            os.write(fd, b"made by another host")
            os.close(fd)
        with ANSWERS:
            handle, entry = await self.tree.create(parent_inode, name, mode, flags, ctx)
            return pyfuse3.FileInfo(fh=handle, keep_cache=self.tree.may_keep_pages), entry

    async def read(self, fh, off, size) -> Any:
        hit = self.tree.hits.get(fh)
        if hit is not None and (data := hit(off, size)) is not None:
            return data
        with ANSWERS:
            return await self.tree.read(fh, off, size)

    async def write(self, fh, off, buf):
        with ANSWERS:
            return await self.tree.write(fh, off, buf)

    async def flush(self, fh):
        with ANSWERS:
            await self.tree.flush(fh)

    async def fsync(self, fh, datasync):
        with ANSWERS:
            await self.tree.fsync(fh, datasync=datasync)

    async def release(self, fh):
        with ANSWERS, self.closing():
            await self.tree.release(fh)

    async def opendir(self, inode, ctx):
        with ANSWERS:
            names = await self.tree.list_names(inode)
        handle = max(self.listings, default=0) + 1
        self.listings[handle] = (inode, names)
        return handle

    async def readdir(self, fh, start_id, token):
        inode, names = self.listings[fh]
        with ANSWERS:
            if start_id == 0:
                names[:] = await self.tree.list_names(inode)
            rest = list(enumerate(names, start=1))[start_id:]

            def reply(name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
                return pyfuse3.readdir_reply(token, name, entry, next_id)

            await self.tree.reply_names(inode, rest, reply)

    async def releasedir(self, fh):
        del self.listings[fh]

    async def fsyncdir(self, fh, datasync):
        with ANSWERS:
            await self.tree.fsyncdir(self.listings[fh][0])

    async def statfs(self, ctx):
        with ANSWERS:
            return await self.tree.statfs()

    async def getxattr(self, inode, name, ctx):
        if inode == pyfuse3.ROOT_INODE and name.startswith(b"user.gauges"):
            with trio.move_on_after(EMPTY_DEADLINE_S):
                while name.endswith(b".empty") and (any(self.gauges()) or self.closings):
                    await self.changed.wait()
            return json.dumps(self.gauges()).encode()
        with ANSWERS:
            return await self.tree.getxattr(inode, name)

    async def setxattr(self, inode, name, value, ctx):
        with ANSWERS:
            await self.tree.setxattr(inode, name, value)

    async def listxattr(self, inode, ctx):
        with ANSWERS:
            return await self.tree.listxattr(inode, ctx)

    async def removexattr(self, inode, name, ctx):
        with ANSWERS:
            await self.tree.removexattr(inode, name)


async def serve(directory: str, ready_fd: int) -> None:
    root_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    tree = LowerTree(root_fd, BlockingCalls("lower", threads_max=16), MemoryEscrow(), first_handle=FIRST_HANDLE)
    options = {"fsname=lower-test", "allow_other", "default_permissions", "nosuid", "nodev", "noexec"}
    pyfuse3.init(LowerOnly(tree), directory, options)
    try:
        os.write(ready_fd, b"1")
        os.close(ready_fd)
        await pyfuse3.main()
    finally:
        pyfuse3.close(unmount=False)
        await tree.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    trio.run(serve, sys.argv[1], int(sys.argv[2]))

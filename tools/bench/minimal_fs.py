"""minimal_fs.py IMAGE MOUNTPOINT: the least that pyfuse3 can do, one file, each read one os.pread.

What basefs is measured against: same library, same mount options, no cache, no map, no checks. Unmount it to end it.
"""

import errno
import os
import stat
import sys

import pyfuse3
import trio

NAME = b"image"
INODE = 2


class OneFile(pyfuse3.Operations):
    """One file in one directory."""

    def __init__(self, image: str) -> None:
        super().__init__()
        self.fd = os.open(image, os.O_RDONLY)
        self.size = os.lseek(self.fd, 0, os.SEEK_END)  # a block device's, too

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o444
        entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else self.size
        entry.st_blksize = 128 * 1024
        entry.entry_timeout = entry.attr_timeout = 1.0
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(INODE)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:  # noqa: ARG002
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, offset: int, size: int) -> bytes:  # noqa: ARG002
        return os.pread(self.fd, size, offset)


def main() -> None:
    image, mountpoint = sys.argv[1:]
    options = {"fsname=minimal", "allow_other", "default_permissions"}
    pyfuse3.init(OneFile(image), mountpoint, options)
    try:
        print("mounted", flush=True)
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


main()

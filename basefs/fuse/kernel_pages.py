"""Takes pages of images out of the kernel's page cache when what was served turned out wrong.

FUSE_NOTIFY_INVAL_INODE waits, unkillably, for every page that is being read, so for answers of ours: a server that
were killed with a thread in there could not be buried, and no other would be started to give the answers. So a
child process of its own does it: it may wait as long as it likes, and outlive us. The page that it waits for is read
anew and right.
"""

import logging
import struct
import subprocess
import sys

import trio

log = logging.getLogger(__name__)

CHILDREN_MAX = 4
_NOTIFY_INVAL_INODE = 2
_WRITE = "import os,sys; os.write(int(sys.argv[1]), bytes.fromhex(sys.argv[2]))"


class KernelPages:
    """`forget` is for the trio loop; it returns at once."""

    def __init__(self, session_fd: int, nursery: trio.Nursery) -> None:
        """`session_fd` speaks to the kernel once the session has begun."""
        self._session_fd = session_fd
        self._nursery = nursery
        self._limiter = trio.CapacityLimiter(CHILDREN_MAX)
        self._pending: set[int] = set()
        self.forgotten = 0
        """Inodes whose pages were taken out, or were not there."""

    def forget(self, inode: int) -> None:
        """Have all pages of `inode` thrown away, soon. One that waits already does for both."""
        if inode not in self._pending:
            self._pending.add(inode)
            self._nursery.start_soon(self._forget, inode)

    async def _forget(self, inode: int) -> None:
        """Ends with its child; cancelled with the service, which leaves the child to itself."""
        try:
            async with self._limiter:
                self._pending.discard(inode)
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-I", "-S", "-c", _WRITE, str(self._session_fd), _message(inode).hex()],
                    pass_fds=[self._session_fd],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                # Not 0: the kernel does not know the inode, so it has no pages of it.
                await process.wait()
                self.forgotten += 1
        except OSError as exc:
            log.warning("pages of inode %d stay in the kernel until they are dropped for room: %s", inode, exc)
        finally:
            self._pending.discard(inode)


def _message(inode: int) -> bytes:
    """`struct fuse_out_header` and `struct fuse_notify_inval_inode_out`: from byte 0 to the end."""
    return struct.pack("<IiQQqq", 40, _NOTIFY_INVAL_INODE, 0, inode, 0, 0)

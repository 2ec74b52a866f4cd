"""Which lower inodes the kernel knows, each held by an O_PATH fd.

Owned by the trio loop: nothing here awaits, and looking up and changing a count is one step. The fd keeps
the inode alive, so an unlinked file that is still open stays usable and its st_ino is not given out again.
An fd is closed when the kernel has forgotten the inode and no call in a thread uses it any more.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from basefs.core.inodes import LOWER, ROOT


class LowerNode:
    """One inode: `fd` is O_PATH and stays valid while `pins` is above zero or the table holds the node.

    `opens` counts open files; a node that has some stays in the table.
    """

    __slots__ = (
        "fd",
        "has_set_id",
        "identity",
        "inode",
        "is_forgotten",
        "lacks_capability",
        "lookups",
        "opens",
        "pins",
    )

    def __init__(self, inode: int, fd: int, status: os.stat_result) -> None:
        self.inode = inode
        self.fd = fd
        self.identity = (status.st_dev, status.st_ino)
        self.lookups = 0
        self.opens = 0
        self.pins = 0
        self.is_forgotten = False
        self.has_set_id = False
        # None: not asked for yet. False: somebody sets it, so nothing is remembered any more.
        self.lacks_capability: bool | None = None
        self.note(status)

    def note(self, status: os.stat_result) -> None:
        """Remembers whether a write has set-id bits to take away."""
        self.has_set_id = bool(status.st_mode & (stat.S_ISUID | stat.S_ISGID)) and stat.S_ISREG(status.st_mode)


class InodeTable:
    """Inode number -> LowerNode. The root is always there and never counted."""

    def __init__(self, root_fd: int) -> None:
        """`root_fd` is an O_PATH fd on the lower directory; the table owns it from here."""
        status = os.fstat(root_fd)
        self.root = LowerNode(ROOT, root_fd, status)
        self._nodes = {ROOT: self.root}

    def __len__(self) -> int:
        """Inodes known besides the root."""
        return len(self._nodes) - 1

    @property
    def lookups(self) -> int:
        """The sum of all lookup counts."""
        return sum(node.lookups for node in self._nodes.values())

    def number(self, status: os.stat_result) -> int:
        """The inode number shown for a lower file; the same in every server."""
        return ROOT if (status.st_dev, status.st_ino) == self.root.identity else LOWER | status.st_ino

    def find(self, inode: int) -> LowerNode | None:
        """The node, if the kernel was told of it in this server's life."""
        return self._nodes.get(inode)

    def clashes(self, status: os.stat_result) -> bool:
        """Whether the file's number belongs to a known file of another file system mounted below."""
        node = self._nodes.get(self.number(status))
        return node is not None and node.identity != (status.st_dev, status.st_ino)

    def know(self, fd: int, status: os.stat_result, *, lookups: int) -> LowerNode:
        """The node for a lower inode, its count raised by `lookups`; takes over `fd` (O_PATH) in every case.

        OSError EXDEV if the number belongs to a file of another file system mounted below.
        """
        if self.clashes(status):
            os.close(fd)
            raise OSError(errno.EXDEV, f"two lower files have inode number {status.st_ino}")
        inode = self.number(status)
        node = self._nodes.get(inode)
        if node is None:
            node = self._nodes[inode] = LowerNode(inode, fd, status)
        else:
            node.note(status)
            node.is_forgotten = False
            self._take_newer_fd(node, fd)
        if node is not self.root:
            node.lookups += lookups
        return node

    def _take_newer_fd(self, node: LowerNode, fd: int) -> None:
        """On a network file system the old fd may be stale while the number lives on: the newer one is right."""
        if node is self.root or node.pins:
            os.close(fd)
        else:
            node.fd, old_fd = fd, node.fd
            os.close(old_fd)

    def forget(self, inode: int, lookups: int) -> int | None:
        """Lowers the count; the fd to close if that was the last use. Unknown inodes are ignored."""
        node = self._nodes.get(inode)
        if node is None or node is self.root:
            return None
        # An inode found again after a restart was counted by the server before us, so this may go below zero.
        node.lookups -= lookups
        if node.lookups > 0:
            return None
        # Nor is that the last word while it is open: an unlinked one would not be found again.
        node.is_forgotten = True
        return None if node.opens else self._remove(node)

    def closed(self, node: LowerNode) -> int | None:
        """One open file fewer; the fd to close if the kernel has forgotten the inode before."""
        node.opens -= 1
        if node.opens or not node.is_forgotten or self._nodes.get(node.inode) is not node:
            return None
        return self._remove(node)

    def _remove(self, node: LowerNode) -> int | None:
        del self._nodes[node.inode]
        return node.fd if node.pins == 0 else None

    @contextlib.contextmanager
    def pinned(self, node: LowerNode) -> Iterator[LowerNode]:
        """Keeps the node's fd open over awaits."""
        node.pins += 1
        try:
            yield node
        finally:
            node.pins -= 1
            # Linux forgets no inode that a request names; should it happen, this close may wait for the disk.
            if node.pins == 0 and self._nodes.get(node.inode) is not node:
                os.close(node.fd)

    def clear(self) -> list[int]:
        """Forgets everything, the root too; the fds to close."""
        fds = [node.fd for node in self._nodes.values()]
        self._nodes.clear()
        return fds

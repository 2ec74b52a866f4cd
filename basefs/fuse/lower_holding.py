"""From an inode number in a request to an fd that stays open while the request runs."""

import contextlib
import os

import pyfuse3
import trio

from basefs import errors
from basefs.core.inodes import LOWER, is_lower
from basefs.fuse.lower_attributes import entry_attributes
from basefs.fuse.lower_calls import LowerCalls, in_our_words
from basefs.fuse.lower_disk import close_all, find_inode
from basefs.fuse.lower_inodes import InodeTable, LowerNode
from basefs.fuse.lower_syscalls import generation_of

# A search after a restart looks at this many directory entries, about a second of a local disk.
_SEARCH_ENTRIES_MAX = 200_000


class LowerInodes:
    """The lower inodes the kernel knows, and those it knew from the server before this one."""

    def __init__(self, root_fd: int, calls: LowerCalls, *, timeout_s: float) -> None:
        """`root_fd` (any fd on the lower directory) stays the caller's; `timeout_s` is told to the kernel."""
        self.table = InodeTable(os.open(".", os.O_PATH | os.O_DIRECTORY, dir_fd=root_fd))
        self._calls = calls
        self._timeout_s = timeout_s
        self._searching = trio.Lock()

    async def held(self, inode: int) -> contextlib.AbstractContextManager[LowerNode]:
        """A context, to be entered at once, which gives the node and keeps its fd open.

        NoSuchEntryError if the lower directory has no such inode.
        """
        node = self.table.find(inode)
        if node is None:
            node = await self._find_again(inode)
        # No checkpoint between here and the `with` that pins it.
        return self.table.pinned(node)

    async def _find_again(self, inode: int) -> LowerNode:
        """Searches the tree, one search at a time. The node's count stays 0: the kernel's own is not known."""
        if not is_lower(inode):
            raise errors.NoSuchEntryError(f"inode {inode} is not in the lower directory")
        async with self._searching:
            node = self.table.find(inode)
            if node is None:
                root = self.table.root
                # Numbers with the highest bit set of their own are not told apart from those without: no file
                # system in use gives them out.
                fd, status = await self._calls.run(find_inode, root.fd, inode & ~LOWER, _SEARCH_ENTRIES_MAX)
                node = self.adopt(fd, status, lookups=0)
            return node

    def adopt(self, fd: int, status: os.stat_result, *, lookups: int = 1) -> LowerNode:
        """The node for an fd just opened (O_PATH), which the table takes over, counted as told to the kernel."""
        try:
            return self.table.know(fd, status, lookups=lookups)
        except OSError as exc:
            raise in_our_words(exc) from exc

    def attributes(self, status: os.stat_result) -> pyfuse3.EntryAttributes:
        """The attributes for an answer that names no entry."""
        return entry_attributes(status, self.table.number(status), self._timeout_s)

    def entry(self, fd: int, status: os.stat_result) -> pyfuse3.EntryAttributes:
        """The attributes of the inode behind `fd` for an answer by which the kernel may come to know it.

        With its generation: the lower file system gives an inode number again as soon as nobody has the file that had
        it, and nobody has what only a server before us knew. The kernel, told that it is another one, leaves its old
        inode alone; else a new file is what it remembers of the old one, removed or of another type.
        """
        generation = generation_of(fd) if self._calls.status_in_memory else 0
        return entry_attributes(status, self.table.number(status), self._timeout_s, generation=generation)

    async def forget(self, counts: list[tuple[int, int]]) -> None:
        """Lowers lookup counts; closes what nobody knows any more. Never raises but when cancelled at once."""
        fds = [fd for inode, lookups in counts if (fd := self.table.forget(inode, lookups)) is not None]
        if fds:
            # The last fd of an unlinked file frees its blocks, which may take long; no fd must leak.
            with trio.CancelScope(shield=True):
                await self._calls.run(close_all, fds)

"""The read-only folder `.basefs`: `status.json`, `by-id/<image id>` links, `images/<image id>.json`.

Contents are made when they are read and handed to the kernel with direct_io, so that `cat` sees the present;
a file is rendered once per open, so that one reader sees one state. What is open is left in escrow, so that the reader
goes on with that state when the server dies.
"""

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyfuse3
import trio

from basefs import errors
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.core import inodes
from basefs.core.escrow import Escrow, HeldFd
from basefs.fuse.attributes import new_attributes
from basefs.fuse.image_files import ImageFiles

BASEFS_NAME = b".basefs"
_DIRECTORIES = (inodes.BASEFS_DIR, inodes.BY_ID_DIR, inodes.IMAGES_DIR)
_FIXED = {b"by-id": inodes.BY_ID_DIR, b"images": inodes.IMAGES_DIR, b"status.json": inodes.STATUS_FILE}
_JSON_SUFFIX = ".json"
HELD_PREFIX = "virtual/"
"""Keys are `virtual/<handle>`."""

Entry = tuple[bytes, pyfuse3.EntryAttributes]


class VirtualTree:
    """Everything below `.basefs`. `status` and `report` give JSON values."""

    def __init__(
        self,
        catalog: Catalog,
        images: ImageFiles,
        status: Callable[[], dict[str, Any]],
        report: Callable[[ImageEntry], dict[str, Any]],
        escrow: Escrow,
    ) -> None:
        self._catalog = catalog
        self._images = images
        self._status = status
        self._report = report
        self._started_ns = time.time_ns()
        self._escrow = escrow
        self._contents: dict[int, bytes] = {}
        self._next_handle = 1

    def restore(self, held: Sequence[HeldFd]) -> None:
        """Goes on with the open files of the server before, whose fds are ours from here."""
        for one in held:
            with os.fdopen(one.fd, "rb") as file:
                file.seek(0)
                self._contents[int(one.key.removeprefix(HELD_PREFIX))] = file.read()

    def owns(self, inode: int) -> bool:
        """Whether the inode is one of this tree's."""
        return (
            inode in _DIRECTORIES
            or inode == inodes.STATUS_FILE
            or inodes.link_number_of(inode) is not None
            or inodes.json_number_of(inode) is not None
        )

    def lookup(self, parent_inode: int, name: bytes) -> pyfuse3.EntryAttributes:
        """The entry `name` of one of the three directories.

        Raises:
            NoSuchEntryError: it has none of that name.
        """
        if parent_inode == inodes.BASEFS_DIR:
            inode = _FIXED.get(name)
        elif parent_inode == inodes.BY_ID_DIR:
            inode = self._number(name.decode("utf-8", "replace"), inodes.link_inode)
        elif parent_inode == inodes.IMAGES_DIR and name.endswith(_JSON_SUFFIX.encode()):
            inode = self._number(name.decode("utf-8", "replace").removesuffix(_JSON_SUFFIX), inodes.json_inode)
        else:
            inode = None
        if inode is None:
            raise errors.NoSuchEntryError(f"no {name!r} in .basefs")
        return self.attributes(inode)

    def _number(self, image_id: str, inode_of: Callable[[int], int]) -> int | None:
        entry = self._catalog.by_id(image_id)
        return None if entry is None else inode_of(entry.number)

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """What `stat` shows of an inode of this tree.

        Raises:
            NoSuchEntryError: its image is unknown.
        """
        if inode in _DIRECTORIES:
            attributes = new_attributes(inode, stat.S_IFDIR | 0o555, self._started_ns)
            attributes.st_nlink = 2
            return attributes
        number = inodes.link_number_of(inode)
        if number is not None:
            attributes = new_attributes(inode, stat.S_IFLNK | 0o777, self._started_ns)
            attributes.st_size = len(self.link_target(inode))
            return attributes
        attributes = new_attributes(inode, stat.S_IFREG | 0o444, time.time_ns())
        attributes.st_size = len(self._render(inode))
        attributes.attr_timeout = 0.0
        return attributes

    def link_target(self, inode: int) -> bytes:
        """Where a `by-id` link points: the image's name in the mount's root."""
        number = inodes.link_number_of(inode)
        if number is None:
            raise errors.NotSupportedError(f"inode {inode} is no link")
        return b"../../" + self._images.entry_of(number).base_name.encode()

    def list_names(self, inode: int) -> Iterable[tuple[int, Entry]]:
        """(cookie, (name, attributes)) of a directory, cookies ascending and the same in every server.

        Raises:
            NoSuchEntryError: it is no directory.
        """
        if inode == inodes.BASEFS_DIR:
            return [(at + 1, (name, self.attributes(fixed))) for at, (name, fixed) in enumerate(_FIXED.items())]
        shown = self._images.listed(is_nova=False)
        if inode == inodes.BY_ID_DIR:
            return [(e.number, (e.image_id.encode(), self.attributes(inodes.link_inode(e.number)))) for e in shown]
        if inode == inodes.IMAGES_DIR:
            return [(e.number, (f"{e.image_id}.json".encode(), self._listed_json(e))) for e in self._catalog.entries()]
        raise errors.NoSuchEntryError(f"inode {inode} is no directory")

    def _listed_json(self, entry: ImageEntry) -> pyfuse3.EntryAttributes:
        attributes = new_attributes(inodes.json_inode(entry.number), stat.S_IFREG | 0o444, self._started_ns)
        attributes.entry_timeout = attributes.attr_timeout = 0.0  # the true size costs a rendering: at stat
        return attributes

    def _render(self, inode: int) -> bytes:
        number = inodes.json_number_of(inode)
        if inode == inodes.STATUS_FILE:
            value = self._status()
        elif number is not None:
            value = self._report(self._images.entry_of(number))
        else:
            raise errors.NoSuchEntryError(f"inode {inode} is no file of .basefs")
        return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()

    async def open(self, inode: int, flags: int) -> pyfuse3.FileInfo:
        """A handle on the contents as of now.

        Raises:
            ReadOnlyError: it was to be opened for writing.
        """
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise errors.ReadOnlyError(".basefs is read-only")
        content = self._render(inode)
        while (handle := inode << 16 | self._next_handle) in self._contents:
            self._next_handle = self._next_handle % 0xFFFF + 1
        self._next_handle = self._next_handle % 0xFFFF + 1
        self._contents[handle] = content
        # Without an fd for it the next server renders anew, which is better than no status.
        with contextlib.suppress(OSError), trio.CancelScope(shield=True):
            await self._leave(handle, content)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), direct_io=True)

    async def _leave(self, handle: int, content: bytes) -> None:
        with os.fdopen(os.memfd_create("basefs-file", os.MFD_CLOEXEC), "wb", buffering=0) as file:
            file.write(content)
            await self._escrow.hold(f"{HELD_PREFIX}{handle}", "", file.fileno())

    def owns_handle(self, handle: int) -> bool:
        """Whether the handle is one of this tree's, of this or an earlier server."""
        return self.owns(handle >> 16)

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """A part of the contents; a handle of an earlier server is rendered anew."""
        content = self._contents.get(handle)
        if content is None:
            content = self._contents[handle] = self._render(handle >> 16)
        return content[offset : offset + size]

    async def release(self, handle: int) -> None:
        """The reader is done."""
        self._contents.pop(handle, None)
        with trio.CancelScope(shield=True):
            await self._escrow.drop(f"{HELD_PREFIX}{handle}")

"""Listings: what `readdir` answers, page by page.

A cookie (the id after which the kernel goes on) is made from the name or the image number, not from a position,
so a listing goes on rightly while names come and go, and after a restart of the server. Names are collected when
a listing begins and kept until its end; a listing that this server did not begin is collected again.
"""

import bisect
import zlib
from dataclasses import dataclass, field

import pyfuse3

from basefs import errors
from basefs.catalog.records import ImageEntry
from basefs.core import inodes
from basefs.fuse.image_files import ImageFiles
from basefs.fuse.listing_page import Token, add_entry
from basefs.fuse.lower import LowerTree
from basefs.fuse.virtual_tree import BASEFS_NAME, Entry, VirtualTree

_BASEFS_COOKIE = 1 << 41
_IMAGE_COOKIE = 1 << 42
_COLLISION_BITS = 8


@dataclass(slots=True)
class _Listing:
    """What one listing shows, each part in ascending order of its cookies."""

    lower: list[tuple[int, bytes]] = field(default_factory=list)
    images: list[tuple[int, ImageEntry]] = field(default_factory=list)
    fixed: list[tuple[int, Entry]] = field(default_factory=list)


class Directories:
    """All directories of the mount."""

    def __init__(self, lower: LowerTree, images: ImageFiles, virtual: VirtualTree, *, nova_uid: int | None) -> None:
        self._lower = lower
        self._images = images
        self._virtual = virtual
        self._nova_uid = nova_uid
        self._listings: dict[int, _Listing] = {}

    def open(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """A handle that says which directory, and whether nova asks."""
        if inodes.is_lower(inode):
            return inode
        return inode << 1 | (self._nova_uid is not None and ctx.uid == self._nova_uid)

    async def read(self, handle: int, offset: int, token: Token) -> None:
        """Answer one page of a listing, the entries after cookie `offset`."""
        listing = self._listings.get(handle)
        if listing is None or offset == 0:
            listing = self._listings[handle] = await self._collect(handle)

        def reply(name: bytes, attributes: pyfuse3.EntryAttributes, next_id: int) -> bool:
            return add_entry(token, name, attributes, next_id)

        parent = inodes.ROOT if not inodes.is_lower(handle) else handle
        names = listing.lower[_after(listing.lower, offset) :]
        if names and not await self._lower.reply_names(parent, names, reply):
            return
        for cookie, (name, attributes) in listing.fixed[_after(listing.fixed, offset) :]:
            if not reply(name, attributes, cookie):
                return
        for cookie, entry in listing.images[_after(listing.images, offset) :]:
            if not reply(entry.base_name.encode(), self._images.listing_attributes(entry), cookie):
                return

    def release(self, handle: int) -> None:
        """The listing is over."""
        self._listings.pop(handle, None)

    async def _collect(self, handle: int) -> _Listing:
        if inodes.is_lower(handle):
            return _Listing(lower=_with_cookies(await self._lower.list_names(handle)))
        inode, is_nova = handle >> 1, bool(handle & 1)
        if inode != inodes.ROOT:
            if not self._virtual.owns(inode):
                raise errors.BadHandleError(f"no such directory handle: {handle}")
            return _Listing(fixed=list(self._virtual.list_names(inode)))
        await self._images.wait_known()
        names = [name for name in await self._lower.list_names(inodes.ROOT) if name != BASEFS_NAME]
        there = set(names)
        shown = [entry for entry in self._images.listed(is_nova=is_nova) if entry.base_name.encode() not in there]
        return _Listing(
            lower=_with_cookies(names),
            fixed=[(_BASEFS_COOKIE, (BASEFS_NAME, self._virtual.attributes(inodes.BASEFS_DIR)))],
            images=[(_IMAGE_COOKIE + entry.number, entry) for entry in shown],
        )


def _with_cookies(names: list[bytes]) -> list[tuple[int, bytes]]:
    """Names in the order of their hash; those of one hash get neighbouring cookies."""
    listed: list[tuple[int, bytes]] = []
    for crc, name in sorted((zlib.crc32(name), name) for name in names):
        cookie = (crc << _COLLISION_BITS) + 1
        if listed and listed[-1][0] >= cookie:
            cookie = listed[-1][0] + 1
        listed.append((cookie, name))
    return listed


def _after(
    listed: list[tuple[int, bytes]] | list[tuple[int, Entry]] | list[tuple[int, ImageEntry]], cookie: int
) -> int:
    return bisect.bisect_right(listed, cookie, key=_cookie_of)


def _cookie_of(item: tuple[int, object]) -> int:
    return item[0]

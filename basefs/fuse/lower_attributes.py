"""What the kernel is told about a lower file, and what it asks to be changed."""

import os

import pyfuse3

from basefs.fuse.lower_disk import AttributeChange, Creator

# Python reads files in st_blksize units: 128 KiB gave nova's inspection 3 READs, 4 KiB 24, 1 MiB 9.
BLOCK_BYTES = 128 * 1024


def entry_attributes(
    status: os.stat_result, inode: int, timeout_s: float, *, generation: int = 0
) -> pyfuse3.EntryAttributes:
    """The attributes of a lower file, which the kernel may keep for `timeout_s`; with `generation` an entry's."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode
    entry.generation = generation
    entry.entry_timeout = timeout_s
    entry.attr_timeout = timeout_s
    entry.st_mode = status.st_mode
    entry.st_nlink = status.st_nlink
    entry.st_uid = status.st_uid
    entry.st_gid = status.st_gid
    entry.st_rdev = status.st_rdev
    entry.st_size = status.st_size
    entry.st_blksize = BLOCK_BYTES
    entry.st_blocks = status.st_blocks
    entry.st_atime_ns = status.st_atime_ns
    entry.st_mtime_ns = status.st_mtime_ns
    entry.st_ctime_ns = status.st_ctime_ns
    return entry


def creator(mode: int, ctx: pyfuse3.RequestContext) -> Creator:
    """The owner and the permission bits of what the caller makes."""
    return Creator(uid=ctx.uid, gid=ctx.gid, mode=mode & ~ctx.umask)


def attribute_change(
    attributes: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, ctx: pyfuse3.RequestContext
) -> AttributeChange:
    """What a SETATTR asks for. A change time alone is no change: the lower file system keeps its own."""
    return AttributeChange(
        uid=attributes.st_uid if fields.update_uid else None,
        gid=attributes.st_gid if fields.update_gid else None,
        mode=attributes.st_mode if fields.update_mode else None,
        size=attributes.st_size if fields.update_size else None,
        atime_ns=attributes.st_atime_ns if fields.update_atime else None,
        mtime_ns=attributes.st_mtime_ns if fields.update_mtime else None,
        kills_set_id=ctx.uid != 0,
    )


def statvfs_data(status: os.statvfs_result) -> pyfuse3.StatvfsData:
    """The lower file system's size and what is free of it."""
    data = pyfuse3.StatvfsData()
    data.f_bsize = status.f_bsize
    data.f_frsize = status.f_frsize
    data.f_blocks = status.f_blocks
    data.f_bfree = status.f_bfree
    data.f_bavail = status.f_bavail
    data.f_files = status.f_files
    data.f_ffree = status.f_ffree
    data.f_favail = status.f_favail
    data.f_namemax = status.f_namemax
    return data

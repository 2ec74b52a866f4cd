"""The kernel's FUSE messages as bytes, as libfuse 3 reads and writes them (include/uapi/linux/fuse.h). Pure.

A request is a header of 40 bytes (`IN_HEADER`), the structure of its opcode, then names, each ended by a zero byte.
A reply is a header of 16 bytes (`OUT_HEADER`) and what the functions here give.
"""

import struct
from enum import IntEnum
from typing import NamedTuple, Protocol

IN_HEADER = struct.Struct("<IIQQIIIHH")
"""Length of the whole, opcode, unique, inode, uid, gid, pid, length of extensions, padding."""
OUT_HEADER = struct.Struct("<IiQ")
"""Length of the whole, negative errno, unique."""

LOOKUP_COUNT = struct.Struct("<Q")
FORGET_ONE = struct.Struct("<QQ")
BATCH_FORGET_IN = struct.Struct("<II")
SETATTR_IN = struct.Struct("<IIQQQqqqIIIIIIII")
MKNOD_IN = struct.Struct("<IIII")
MKDIR_IN = struct.Struct("<II")
RENAME_IN = struct.Struct("<Q")
RENAME2_IN = struct.Struct("<QII")
LINK_IN = struct.Struct("<Q")
OPEN_IN = struct.Struct("<II")
CREATE_IN = struct.Struct("<IIII")
RELEASE_IN = struct.Struct("<QIIQ")
FLUSH_IN = struct.Struct("<QIIQ")
READ_IN = struct.Struct("<QQIIQII")
"""Also `fuse_write_in`."""
FSYNC_IN = struct.Struct("<QII")
SETXATTR_IN = struct.Struct("<II")
"""Without `FUSE_SETXATTR_EXT`, which libfuse does not ask for."""
GETXATTR_IN = struct.Struct("<II")
ACCESS_IN = struct.Struct("<II")

_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_ATTR_VALID = struct.Struct("<QII")
_OPEN_OUT = struct.Struct("<QII")
_SIZE_OUT = struct.Struct("<II")
_STATFS = struct.Struct("<QQQQQIIIIIIIIII")
_DIRENT = struct.Struct("<QQII")

_FOPEN_DIRECT_IO, _FOPEN_KEEP_CACHE, _FOPEN_NONSEEKABLE = 1, 2, 4
_NS = 1_000_000_000
_NS_MAX = 999_999_999
_TYPE_SHIFT = 12
_U32 = 0xFFFF_FFFF
_S_IFMT = 0o170000


class Opcode(IntEnum):
    """What is asked for; others are answered ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    OPENDIR = 27
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44
    RENAME2 = 45


NO_REPLY = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT))
"""The kernel waits for no answer to these."""


class SetattrValid(IntEnum):
    """Bits of `fuse_setattr_in.valid`: what is to be changed."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    CTIME = 1 << 10


class Request(NamedTuple):
    """One request; `body` is what follows its header, as long as the buffer that it was read from stays."""

    opcode: int
    unique: int
    inode: int
    uid: int
    gid: int
    pid: int
    body: memoryview

    def names(self, at: int, count: int) -> list[bytes]:
        """The `count` names from byte `at` of the body on, without their zero bytes.

        Raises:
            ValueError: There are fewer.
        """
        parts = bytes(self.body[at:]).split(b"\0", count)
        if len(parts) <= count:
            raise ValueError(f"opcode {self.opcode}: {len(parts) - 1} names where there should be {count}")
        return parts[:count]


def request_of(raw: memoryview) -> Request:
    """What the bytes of one whole request say.

    Raises:
        ValueError: They are not as many as their header says.
    """
    if len(raw) < IN_HEADER.size:
        raise ValueError(f"a request of {len(raw)} bytes")
    length, opcode, unique, inode, uid, gid, pid, extension_words, _ = IN_HEADER.unpack_from(raw)
    end = length - 8 * extension_words
    if length != len(raw) or end < IN_HEADER.size:
        raise ValueError(f"opcode {opcode}: {len(raw)} bytes where the header says {length}")
    return Request(opcode, unique, inode, uid, gid, pid, raw[IN_HEADER.size : end])


class Attributes(Protocol):
    """As `pyfuse3.EntryAttributes`. Times in nanoseconds, timeouts in seconds."""

    st_ino: int
    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_rdev: int
    st_size: int
    st_blksize: int
    st_blocks: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int
    generation: int
    entry_timeout: float
    attr_timeout: float


class OpenedFile(Protocol):
    """As `pyfuse3.FileInfo`."""

    fh: int
    direct_io: bool
    keep_cache: bool
    nonseekable: bool


class FileSystemNumbers(Protocol):
    """As `pyfuse3.StatvfsData`."""

    f_bsize: int
    f_frsize: int
    f_blocks: int
    f_bfree: int
    f_bavail: int
    f_files: int
    f_ffree: int
    f_namemax: int


def reply_header(unique: int, body_bytes: int) -> bytes:
    """What precedes a reply of so many bytes."""
    return OUT_HEADER.pack(OUT_HEADER.size + body_bytes, 0, unique)


def error_reply(unique: int, errno: int) -> bytes:
    """A whole reply that says errno; 0: done, with nothing to tell."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)


def _attr(of: Attributes) -> bytes:
    """`fuse_attr`."""
    atime_s, atime_ns = divmod(of.st_atime_ns, _NS)
    mtime_s, mtime_ns = divmod(of.st_mtime_ns, _NS)
    ctime_s, ctime_ns = divmod(of.st_ctime_ns, _NS)
    return _ATTR.pack(
        of.st_ino, of.st_size, of.st_blocks,
        atime_s & 0xFFFF_FFFF_FFFF_FFFF, mtime_s & 0xFFFF_FFFF_FFFF_FFFF, ctime_s & 0xFFFF_FFFF_FFFF_FFFF,
        atime_ns, mtime_ns, ctime_ns,
        of.st_mode, of.st_nlink, of.st_uid, of.st_gid, of.st_rdev & _U32, of.st_blksize, 0,
    )  # fmt: skip


def _timeout(seconds: float) -> tuple[int, int]:
    """Whole seconds and nanoseconds, cut as libfuse cuts them."""
    whole = max(0, int(seconds))
    return whole, min(max(0, int((seconds - whole) * 1e9)), _NS_MAX)


def attr_reply(of: Attributes) -> bytes:
    """`fuse_attr_out`."""
    return _ATTR_VALID.pack(*_timeout(of.attr_timeout), 0) + _attr(of)


def entry_reply(of: Attributes) -> bytes:
    """`fuse_entry_out`."""
    entry_s, entry_ns = _timeout(of.entry_timeout)
    attr_s, attr_ns = _timeout(of.attr_timeout)
    return _ENTRY.pack(of.st_ino, of.generation, entry_s, attr_s, entry_ns, attr_ns) + _attr(of)


def open_reply(of: OpenedFile) -> bytes:
    """`fuse_open_out`."""
    flags = _FOPEN_DIRECT_IO if of.direct_io else 0
    flags |= _FOPEN_KEEP_CACHE if of.keep_cache else 0
    flags |= _FOPEN_NONSEEKABLE if of.nonseekable else 0
    return _OPEN_OUT.pack(of.fh, flags, 0)


def opendir_reply(handle: int) -> bytes:
    """`fuse_open_out` of a directory."""
    return _OPEN_OUT.pack(handle, 0, 0)


def size_reply(size: int) -> bytes:
    """`fuse_write_out` and `fuse_getxattr_out`."""
    return _SIZE_OUT.pack(size, 0)


def statfs_reply(of: FileSystemNumbers) -> bytes:
    """`fuse_statfs_out`."""
    counts = (of.f_blocks, of.f_bfree, of.f_bavail, of.f_files, of.f_ffree)
    return _STATFS.pack(*counts, of.f_bsize, of.f_namemax, of.f_frsize, 0, 0, 0, 0, 0, 0, 0)


def direntplus(name: bytes, of: Attributes, next_id: int) -> bytes:
    """One entry of a READDIRPLUS reply: `fuse_direntplus`, the name, zeros up to a multiple of 8."""
    fixed = entry_reply(of) + _DIRENT.pack(of.st_ino, next_id, len(name), (of.st_mode & _S_IFMT) >> _TYPE_SHIFT)
    length = len(fixed) + len(name)
    return fixed + name + bytes(-length % 8)

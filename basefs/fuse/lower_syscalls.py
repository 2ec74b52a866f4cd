"""System calls on the lower directory that Python's `os` does not offer.

They block and run in threads, but for those that say otherwise. An fd opened with O_PATH takes part in most
calls only through its link in /proc, which leads to the very inode, never along a path; symbolic links are
not followed.
"""

import ctypes
import errno
import os
import struct
import zlib

_UTIME_OMIT = (1 << 30) - 2
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_HANDLE_HEAD = struct.Struct("@Ii")
"""Of struct file_handle: length, type."""
_HANDLE_BYTES_MAX = 128
_NS_PER_S = 1_000_000_000

_SYS_OPENAT2 = 437  # the same on all architectures
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_CACHED = 0x20
_STATFS_BYTES = 512  # more than any struct statfs
_LOCAL_FILE_SYSTEMS = frozenset(
    (
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0x01021994,  # tmpfs
    )
)

_libc = ctypes.CDLL(None, use_errno=True)


_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
_libc.utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int)
_libc.name_to_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_handle = bytearray(_HANDLE_HEAD.size + _HANDLE_BYTES_MAX)
_handle_there = (ctypes.c_char * len(_handle)).from_buffer(_handle)
_mount_id = ctypes.byref(ctypes.c_int())


def proc_path(fd: int) -> str:
    """The name under which calls that want a path take the inode behind `fd`, an O_PATH fd included."""
    return f"/proc/self/fd/{fd}"


def set_times(fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Sets the times given, in nanoseconds since 1970 (negative: before); None leaves that one alone."""
    # struct timespec times[2], each of two longs
    times = struct.pack("@llll", *_timespec(atime_ns), *_timespec(mtime_ns))
    _check(_libc.utimensat(_AT_FDCWD, proc_path(fd).encode(), times, 0))


def _timespec(time_ns: int | None) -> tuple[int, int]:
    return (0, _UTIME_OMIT) if time_ns is None else divmod(time_ns, _NS_PER_S)


def open_cached(parent_fd: int, name: bytes) -> int | None:
    """An O_PATH fd on an entry that the lower kernel has in memory. Never blocks: for the trio loop.

    FileNotFoundError if it has in memory that there is no such name. None: only the disk can tell, or a kernel
    before 5.12; ask in a thread.
    """
    how = struct.pack("@QQQ", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_NO_XDEV | _RESOLVE_CACHED)
    fd: int = _libc.syscall(_SYS_OPENAT2, parent_fd, name, how, len(how))
    if fd >= 0:
        return fd
    if ctypes.get_errno() == errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(name))
    return None


def stays_in_memory(fd: int) -> bool:
    """Whether the status of an open inode is in memory always: not so where another host may change it."""
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    _check(_libc.fstatfs(fd, status))
    # struct statfs begins with `long f_type`.
    return struct.unpack_from("@l", status.raw)[0] in _LOCAL_FILE_SYSTEMS


def generation_of(fd: int) -> int:
    """32 bits that tell the inode behind `fd` from any other that had, or will have, its st_ino; 0: there are none.

    A checksum of its NFS file handle, in which the file system puts st_ino and a number of its own for that: the same
    at any time and for every process. For the trio loop: one buffer for all calls, and no file system of this host
    blocks (3 us).
    """
    _HANDLE_HEAD.pack_into(_handle, 0, _HANDLE_BYTES_MAX, 0)
    if _libc.name_to_handle_at(fd, b"", _handle_there, _mount_id, _AT_EMPTY_PATH) != 0:
        return 0
    length, _ = _HANDLE_HEAD.unpack_from(_handle)
    return zlib.crc32(_handle[4 : _HANDLE_HEAD.size + length])


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

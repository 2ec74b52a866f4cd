"""System calls on the lower directory that Python's `os` does not offer, or not without a path.

All of them block: they run in threads. An fd opened with O_PATH takes part in most calls only through
its link in /proc, which leads to the very inode, never along a path; symbolic links are not followed.
"""

import ctypes
import os
import struct

_UTIME_OMIT = (1 << 30) - 2
_AT_FDCWD = -100
_NS_PER_S = 1_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)


_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_libc.utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int)


def proc_path(fd: int) -> str:
    """The name under which calls that want a path take the inode behind `fd`, an O_PATH fd included."""
    return f"/proc/self/fd/{fd}"


def rename_with_flags(old_fd: int, old_name: bytes, new_fd: int, new_name: bytes, flags: int) -> None:
    """renameat2(2). OSError as the file system says it: EINVAL where it knows no flags."""
    _check(_libc.renameat2(old_fd, old_name, new_fd, new_name, flags))


def set_times(fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Sets the times given, in nanoseconds since 1970 (negative: before); None leaves that one alone."""
    # struct timespec times[2], each of two longs
    times = struct.pack("@llll", *_timespec(atime_ns), *_timespec(mtime_ns))
    _check(_libc.utimensat(_AT_FDCWD, proc_path(fd).encode(), times, 0))


def _timespec(time_ns: int | None) -> tuple[int, int]:
    return (0, _UTIME_OMIT) if time_ns is None else divmod(time_ns, _NS_PER_S)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

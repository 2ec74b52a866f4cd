"""renameat2(2), which Python's os module does not offer."""

import ctypes
import os

RENAME_NOREPLACE = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def rename_with_flags(old_fd: int, old_name: bytes, new_fd: int, new_name: bytes, flags: int) -> None:
    """renameat2(2), in a thread. OSError as the file system says it: EINVAL where it knows no flags.

    An absolute `old_name` is looked up without `old_fd`.
    """
    if _libc.renameat2(old_fd, old_name, new_fd, new_name, flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

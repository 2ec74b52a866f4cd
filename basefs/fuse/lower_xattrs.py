"""Extended attributes of lower files: blocking functions over an O_PATH fd, run in threads.

POSIX ACLs are not offered: the mount's kernel checks permissions by mode bits alone, and an ACL's mask would
read to it as the rights of the owning group. Everything else passes through.
"""

import os

from basefs import errors
from basefs.fuse.lower_syscalls import proc_path

CAPABILITY = b"security.capability"
_ACL_PREFIX = b"system.posix_acl_"
_ROOT_ONLY_PREFIX = b"trusted."


def get_attribute(fd: int, name: bytes) -> bytes:
    """The value. OSError ENODATA if it is not there."""
    _refuse_acl(name)
    return os.getxattr(proc_path(fd), name)


def set_attribute(fd: int, name: bytes, value: bytes) -> None:
    """Creates or replaces an attribute."""
    _refuse_acl(name)
    os.setxattr(proc_path(fd), name, value)


def remove_attribute(fd: int, name: bytes) -> None:
    """Removes an attribute. OSError ENODATA if it is not there."""
    _refuse_acl(name)
    os.removexattr(proc_path(fd), name)


def list_attributes(fd: int, for_root: bool) -> list[bytes]:
    """The names that the caller may see: a local file system shows `trusted.*` to root only."""
    names = [os.fsencode(name) for name in os.listxattr(proc_path(fd))]
    return [
        name
        for name in names
        if not name.startswith(_ACL_PREFIX) and (for_root or not name.startswith(_ROOT_ONLY_PREFIX))
    ]


def _refuse_acl(name: bytes) -> None:
    if name.startswith(_ACL_PREFIX):
        raise errors.NotSupportedError("POSIX ACLs are not offered on this mount")

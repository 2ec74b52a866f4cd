"""What a keeper needs to know of a session that another keeper began, as bytes in a memfd. Standard library only."""

import fcntl
import json
import os
import zlib
from typing import Any, NamedTuple

from basefs.mounts import Mount

VERSION = 1
"""Of this format. A keeper of another version mounts anew rather than guess."""
BYTES_MAX = 1024 * 1024
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class SavedSession(NamedTuple):
    """A FUSE session: its mount's line of mountinfo, the kernel's FUSE_INIT, and what cannot change while mounted."""

    mountpoint: str
    cache_dir: str
    entry: Mount
    init_request: bytes
    fixed: dict[str, Any]
    """What the keeper that mounted told its servers of that kind."""

    def to_memfd(self) -> int:
        """An fd of a file in memory that holds it and can never be changed."""
        content = {
            "version": VERSION,
            "mountpoint": self.mountpoint,
            "cache_dir": self.cache_dir,
            "entry": self.entry._asdict(),
            "init_request": self.init_request.hex(),
            "fixed": self.fixed,
        }
        data = json.dumps(content).encode()
        fd = os.memfd_create("basefs-session", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, b"%08x" % zlib.crc32(data) + data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd

    @classmethod
    def from_memfd(cls, fd: int) -> "SavedSession":
        """What `to_memfd` wrote.

        Raises:
            ValueError: It is damaged, of another version, or something else; the message says which.
        """
        try:
            raw = os.pread(fd, BYTES_MAX, 0)
        except OSError as exc:
            raise ValueError(f"it cannot be read: {exc.strerror}") from None
        checksum, data = raw[:8], raw[8:]
        if checksum != b"%08x" % zlib.crc32(data):
            raise ValueError("its checksum is wrong")
        content = json.loads(data)
        try:
            if content["version"] != VERSION:
                raise ValueError(f"it is of version {content['version']}, this keeper knows version {VERSION}")
            return cls(
                mountpoint=str(content["mountpoint"]),
                cache_dir=str(content["cache_dir"]),
                entry=Mount(**content["entry"]),
                init_request=bytes.fromhex(content["init_request"]),
                fixed=dict(content["fixed"]),
            )
        except (KeyError, TypeError) as exc:
            raise ValueError(f"it lacks {exc}") from None

"""An attached volume's bytes, from the fd of its device or file."""

import errno
import os
import stat

from basefs import errors


class FdVolumeBytes:
    """`VolumeBytes` over a block device or a file, whose fd is its own from here."""

    def __init__(self, fd: int) -> None:
        """Raises VolumeError, and leaves the fd to the caller, if it is neither."""
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISBLK(mode) and not stat.S_ISREG(mode):
                raise errors.VolumeError("what was attached is neither a block device nor a file")
            self.size = os.lseek(fd, 0, os.SEEK_END)
        except OSError as exc:
            raise errors.VolumeError(f"the size of what was attached cannot be had: {exc.strerror}") from exc
        self._fd = fd
        self._can_tell = True
        """Whether the file system can say that a read would wait; NFS cannot (EOPNOTSUPP)."""

    def read_now(self, target: list[memoryview], offset: int) -> bool:
        """See `VolumeBytes`: pages that are in memory."""
        if not self._can_tell:
            return False
        try:
            # Closed: -1, which is no fd. Inline, as in `ChunkFile.hit`.
            return os.preadv(self._fd, target, offset, os.RWF_NOWAIT) == sum(len(one) for one in target)
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                self._can_tell = False
            return False

    def read(self, offset: int, length: int) -> bytes:
        """See `VolumeBytes`."""
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            # A signal or the file system may cut a read short; nothing more is the end.
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, f"the volume ends after {offset + len(data)} bytes")
            data += more
        return data

    def fd_to_hold(self) -> int | None:
        """See `VolumeBytes`."""
        return self._fd if self._fd >= 0 else None

    def close(self) -> None:
        """See `VolumeBytes`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

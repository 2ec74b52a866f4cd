"""A LowerTree mounted over a directory by a child process, for tests."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

MS_REMOUNT = 32
SERVER = Path(__file__).with_name("lower_server.py")
_libc = ctypes.CDLL(None, use_errno=True)


class LowerMount:
    """`path` is the mount point, `beneath` the same directory as it is without the mount."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._beneath_fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
        self.beneath = Path(f"/proc/{os.getpid()}/fd/{self._beneath_fd}/.")
        self.server: subprocess.Popen[bytes] | None = None
        self.log = path.with_name(path.name + ".log")

    def __enter__(self) -> Self:
        ready, writing = os.pipe()
        with open(ready, "rb") as ready_file, open(self.log, "wb") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-W", "error", SERVER, self.path, str(writing)],
                pass_fds=[writing],
                stdout=log,
                stderr=log,
            )
            os.close(writing)
            if ready_file.read(1) != b"1":
                self.__exit__(None, None, None)
                raise RuntimeError(f"no mount: {self.log.read_text()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.server is not None
        if os.path.ismount(self.path) or not self._answers():
            subprocess.run(["umount", *([] if error is None else ["-l"]), self.path], check=error is None)
        try:
            status = self.server.wait(20)
        except subprocess.TimeoutExpired:
            self.server.kill()
            raise
        finally:
            os.close(self._beneath_fd)
        if error is None:
            assert (status, self.log.read_text()) == (0, "")

    def _answers(self) -> bool:
        try:
            os.stat(self.path)
        except OSError:
            return False
        return True

    def gauges(self) -> list[int]:
        """[known inodes, lookups, open files] of the server now."""
        return json.loads(os.getxattr(self.path, "user.gauges"))

    def forget_all(self) -> list[int]:
        """Makes the kernel drop every inode that nobody uses; the gauges when they came to zero, or after 20 s."""
        # A remount that changes nothing drops the unused directory entries, and FUSE inodes go with them.
        if _libc.mount(b"none", os.fsencode(self.path), None, MS_REMOUNT, None) != 0:
            raise OSError(ctypes.get_errno(), "remount")
        return json.loads(os.getxattr(self.path, "user.gauges.empty"))

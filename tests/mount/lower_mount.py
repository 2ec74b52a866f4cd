"""A LowerTree mounted over a directory by a child process, for tests."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

MS_REMOUNT, MS_NOSUID, MS_NODEV, MS_NOEXEC = 32, 2, 4, 8
# A release that is under way while the mount goes away has nobody to answer to; pyfuse3 logs it.
UNANSWERED = "fuse_release(): fuse_reply_* failed with No such file or directory"
ROOT = Path(__file__).parents[2]
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
                [sys.executable, "-W", "error", "-m", "tests.mount.lower_server", self.path, str(writing)],
                cwd=ROOT,
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
        busy = subprocess.run(["umount", self.path], capture_output=True, text=True, check=False).stderr
        if busy:
            subprocess.run(["umount", "-l", self.path], capture_output=True, check=False)
        try:
            status = self.server.wait(1 if busy else 20)
        except subprocess.TimeoutExpired:
            self.server.kill()
            raise
        finally:
            os.close(self._beneath_fd)
        if error is None:
            log = [line for line in self.log.read_text().splitlines() if UNANSWERED not in line]
            assert (status, log, busy) == (0, [], "")

    def gauges(self) -> list[int]:
        """[known inodes, lookups, open files] of the server now."""
        return json.loads(os.getxattr(self.path, "user.gauges"))

    def forget_all(self) -> list[int]:
        """Makes the kernel drop every inode that nobody uses; the gauges when they came to zero, or after 20 s."""
        # A remount that changes nothing drops the unused directory entries, and FUSE inodes go with them.
        if _libc.mount(b"none", os.fsencode(self.path), None, MS_REMOUNT | MS_NOSUID | MS_NODEV | MS_NOEXEC, None) != 0:
            raise OSError(ctypes.get_errno(), "remount")
        return json.loads(os.getxattr(self.path, "user.gauges.empty"))


class LowerSubdirectory:
    """An empty directory of a mount, for one test; has the mount's `path`, `beneath` and `forget_all`."""

    def __init__(self, mount: LowerMount, name: str) -> None:
        self.path = mount.path / name
        self.beneath = mount.beneath / name
        self.forget_all = mount.forget_all

    def __enter__(self) -> Self:
        self.path.mkdir()
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.beneath)

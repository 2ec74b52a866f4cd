"""A disk that lies on command: a FUSE file system for tests, mounted where a `cache_dir` is to be.

    with FaultFs(backing=tmp_path / "disk", path=tmp_path / "cache", log=tmp_path / "writes.log") as disk:
        rule = disk.fail("EIO", ops=["read"], names="chunks/*.data", times=1)
        disk.hang(ops=["write", "fsync"], names="state.sqlite*")      # until lift(), then it goes on
        disk.flip(names="chunks/*.data")                              # one byte of every read is wrong
        disk.lift(rule)                                               # or lift() for all rules
        disk.seen(rule)                                               # how often it struck
        disk.claim_free(0)                                            # what statfs says; None: the truth

- It runs in a process of its own, so it goes on when basefs is killed, and passes everything through to `backing`
  (with basefs's LowerTree) unless a rule matches: the first one added wins. `names` is a shell pattern for the path
  below the mount. sqlite, shared mappings and O_DIRECT work on it.
- Setting and lifting a rule throws the kernel's pages of the file system away, so that reads come here again.
- With `log`, every write, truncation, create, rename, unlink, mkdir and fsync is recorded with its data in the order
  in which they ended (`tests.faultfs.log.records` reads it). Writes through a shared mapping are recorded when the
  kernel writes the page back, as on a disk.

What is different from a disk, found by trying:
- RWF_NOWAIT and fallocate answer EOPNOTSUPP: basefs reads every chunk in a thread, and zeros are written, not punched.
- A process that waits for a hung request cannot be killed, as on a disk that hangs; `lift()` and `close()` free it
  (close aborts the connection, so nothing hangs for ever). `sync(2)` of anybody hangs as long.
- A read error of a page that a process has mapped is a SIGBUS to it, as on a disk.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 20.0
END_S = 20.0
WRITING = ("write", "truncate", "create", "rename", "unlink", "mkdir", "link")
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


class FaultFs:
    """A mounted one; every method returns once the server has done it. `close` frees everybody who hangs in it."""

    def __init__(self, *, backing: Path, path: Path, log: Path | None = None) -> None:
        for directory in (backing, path):
            directory.mkdir(parents=True, exist_ok=True)
        self.backing = backing
        self.path = path
        self.log = log
        self._errors = path.with_name(path.name + ".faultfs.log")
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(START_S)
        self._lines = self._socket.makefile("r", encoding="utf-8")
        with theirs, open(self._errors, "wb") as errors:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "tests.faultfs.server", str(backing), str(path), str(theirs.fileno()),
                    str(log or ""),
                ],
                cwd=ROOT, pass_fds=[theirs.fileno()], stdout=errors, stderr=errors,
            )  # fmt: skip
        if self._lines.readline() != '"ready"\n':
            self.close()
            raise RuntimeError(f"no mount: {self._errors.read_text()}")
        # The minor number is the connection's name; reads that hang must not take the few background slots.
        self._connection = Path(f"/sys/fs/fuse/connections/{os.minor(os.stat(path).st_dev)}")
        (self._connection / "max_background").write_text("10000")

    def fail(self, error: str, *, ops: list[str], names: str = "*", times: int | None = None, after: int = 0) -> int:
        """Have matching requests fail with this errno's name, `times` of them after the first `after`; the rule."""
        return self._add("fail", ops, names, times, after, error)

    def hang(self, *, ops: list[str], names: str = "*", times: int | None = None, after: int = 0) -> int:
        """Have matching requests wait until the rule is lifted; then they are done as if nothing had been."""
        return self._add("hang", ops, names, times, after, "")

    def flip(self, *, names: str = "*", times: int | None = None, after: int = 0) -> int:
        """Have matching reads give one byte in their middle wrong."""
        return self._add("flip", ["read"], names, times, after, "")

    def read_only(self, names: str = "*") -> int:
        """What the kernel makes of a file system after an error: EROFS for every change."""
        return self.fail("EROFS", ops=[*WRITING, "open_writing"], names=names)

    def lift(self, rule: int | None = None) -> None:
        """Take back one rule, or all."""
        self._ask("lift", rule=rule)

    def seen(self, rule: int) -> int:
        """How many requests the rule struck, also after it was lifted."""
        return self._ask("seen", rule=rule)

    def drop_pages(self) -> None:
        """Throw the kernel's pages of every file away, as far as they are not mapped, locked or being written."""
        self._ask("drop_pages")

    def claim_free(self, free_bytes: int | None) -> None:
        """What statfs says is free; None: the truth."""
        self._ask("claim_free", free_bytes=free_bytes)

    def mark(self, text: str) -> None:
        """Write a record of its own into the log, after what was recorded so far."""
        self._ask("mark", text=text)

    def _add(self, kind: str, ops: list[str], names: str, times: int | None, after: int, error: str) -> int:
        return self._ask("add", kind=kind, ops=ops, names=names, times=times, after=after, error=error)

    def _ask(self, command: str, **values: object) -> Any:
        self._socket.sendall(json.dumps({"command": command, **values}).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"faultfs died: {self._errors.read_text()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmount, however it is used; requests that hang fail with ECONNABORTED. Twice is the same as once."""
        if self._process.poll() is None and hasattr(self, "_connection"):
            self._ask("lift", rule=None)
        _libc.umount2(os.fsencode(self.path), _MNT_DETACH)
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            if (self._connection / "abort").exists():
                (self._connection / "abort").write_text("1")
            self._process.kill()
            self._process.wait()
        self._lines.close()
        self._socket.close()

"""Ways to read a file of the mount past the kernel's page cache, and to wait for what must come true."""

import mmap
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

ALIGNMENT = 4096
LIMIT_S = 60.0
"""Nothing that is waited for here takes that long on an idle machine; a loaded one is given the time."""
_PAUSE_S = 0.05


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """An fd whose reads go to the server, not to the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        with suppress(OSError):  # ENOTCONN where the mount went meanwhile; the fd is gone all the same
            os.close(fd)


def pread(fd: int, offset: int, length: int) -> bytes:
    """What pread(2) gives; offset is aligned, length is rounded up to be so."""
    with mmap.mmap(-1, -(-length // ALIGNMENT) * ALIGNMENT) as buffer:
        return buffer[: min(length, os.preadv(fd, [buffer], offset))]


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Open, read, close."""
    with opened(path) as fd:
        return pread(fd, offset, length)


def errno_of(call: Callable[[], object]) -> int:
    """The errno with which `call` failed; 0 when it did not."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def eventually(is_true: Callable[[], object]) -> None:
    """Return as soon as `is_true()`; an OSError of it counts as "not yet". AssertionError after LIMIT_S."""
    pause = threading.Event()
    deadline = time.monotonic() + LIMIT_S
    last: object = None
    while time.monotonic() < deadline:
        try:
            if is_true():
                return
            last = "false"
        except OSError as error:
            last = error
        pause.wait(_PAUSE_S)
    raise AssertionError(f"still not so after {LIMIT_S:g} s: {last}")


@contextmanager
def reader_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` threads; whoever leaves with one still reading waits for it."""
    with ThreadPoolExecutor(count, thread_name_prefix="reader") as pool:
        yield pool


def guest_program(directory: Path) -> Path:
    """A `dd` that basefs takes for a qemu system emulator."""
    program = directory / "qemu-system-x86_64"
    if not program.exists():
        shutil.copyfile(shutil.which("dd") or "/usr/bin/dd", program)
        program.chmod(0o755)
    return program


@contextmanager
def guest_copying(directory: Path, path: Path, *, out: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process with a guest's identity that copies `path` to `out`; it does not outlive the block."""
    argv = [str(guest_program(directory)), f"if={path}", f"of={out}", "bs=64k", "iflag=direct", "status=none"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as guest:
        try:
            yield guest
        finally:
            guest.kill()

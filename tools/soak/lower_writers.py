"""Writers of lower files: each keeps its files open, writes, reads back, renames and unlinks, and trusts nothing."""

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

FILE_BYTES = 1 << 20
WRITE_BYTES_MAX = 64 * 1024


class LowerWriter:
    """One thread with one file that stays open, across everything that happens to the server."""

    def __init__(self, directory: Path, number: int) -> None:
        self.rounds = 0
        self.errors: list[str] = []
        self._path = directory / f"soak-{number}.part"
        self._random = random.Random(number)
        self._content = bytearray()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and remove the file."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                while not self._stop.wait(0.01):
                    self._round(fd)
                    self.rounds += 1
            finally:
                os.close(fd)
                with contextlib.suppress(FileNotFoundError):
                    self._path.unlink()
        except OSError as error:
            self.errors.append(f"{self._path.name}, round {self.rounds}: {error}")

    def _round(self, fd: int) -> None:
        data = self._random.randbytes(self._random.randint(1, WRITE_BYTES_MAX))
        offset = self._random.randrange(FILE_BYTES)
        written = os.pwrite(fd, data, offset)
        if written != len(data):
            self.errors.append(f"{self._path.name}: {written} of {len(data)} bytes written")
        self._content.extend(bytes(max(0, offset + len(data) - len(self._content))))
        self._content[offset : offset + len(data)] = data
        if self._random.random() < 0.1:
            os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        at = self._random.randrange(len(self._content))
        if os.pread(fd, WRITE_BYTES_MAX, at) != self._content[at : at + WRITE_BYTES_MAX]:
            self.errors.append(f"{self._path.name}, round {self.rounds}: other bytes at {at} than were written")


@contextlib.contextmanager
def lower_writers(directory: Path, count: int) -> Iterator[list[LowerWriter]]:
    """`count` of them write while the block runs."""
    writers = [LowerWriter(directory, number) for number in range(count)]
    for writer in writers:
        writer.start()
    try:
        yield writers
    finally:
        for writer in writers:
            writer.stop()

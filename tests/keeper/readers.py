"""Readers in a process of their own: one that has a file of a mount without a server open can start no other."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CODE = """
import json, os, select, sys, threading
path, wanted = sys.argv[1], bytes(range(256)) * 16
reads, failures = [0, 0, 0], []
has_read = threading.Condition()
stop = threading.Event()

def read_on(number):
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while not stop.is_set():
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if os.pread(file.fileno(), 4096, reads[number] * 4096 % size) != wanted:
                    failures.append("wrong bytes")
                with has_read:
                    reads[number] += 1
                    has_read.notify_all()
    except OSError as exc:
        failures.append(repr(exc))
        with has_read:
            has_read.notify_all()

threads = [threading.Thread(target=read_on, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for line in sys.stdin:  # each line asks for two more reads of each: the second began after it
    with has_read:
        seen = list(reads)
        has_read.wait_for(lambda: failures or all(now >= then + 2 for now, then in zip(reads, seen)))
    print(json.dumps(failures), flush=True)
stop.set()
"""


class Readers:
    """Three threads that read a file of `bytes(range(256)) * n`, past the page cache, again and again."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def must_go_on(self) -> None:
        """Returns when each of them has begun and ended a read; none has failed so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert json.loads(self._process.stdout.readline()) == []

    def end(self) -> None:
        self._process.communicate(timeout=30)

    def clean_up(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def reading(path: Path) -> Iterator[Readers]:
    """They read while the block runs, and none of their reads fails, the last ones after it included."""
    readers = Readers(path)
    try:
        readers.must_go_on()
        yield readers
        readers.must_go_on()
        readers.end()
    finally:
        readers.clean_up()

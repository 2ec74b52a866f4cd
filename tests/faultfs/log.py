"""The record of what was written to a `FaultFs`: a JSON line a request, each followed by its data."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request that changed something, or a mark.

    `op`: write, truncate (`offset` is the new size), create, mkdir, rename (to `other`), unlink, link (as `other`),
    fsync (all that stood in the log before record `began` and concerns `name` is on the disk), mark (`name` is its
    text). Names are paths below the mount; the name of a file that was unlinked while open is "".
    """

    op: str
    name: str
    other: str = ""
    offset: int = 0
    began: int = 0
    data: bytes = b""


class LogWriter:
    """Appends records."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.count = 0

    def add(self, record: Record) -> None:
        """One more; with the operating system when this returns."""
        head = {"op": record.op, "name": record.name, "other": record.other, "offset": record.offset}
        line = json.dumps({**head, "began": record.began, "bytes": len(record.data)})
        self._file.write(line.encode() + b"\n" + record.data)
        self._file.flush()
        self.count += 1


def records(path: Path) -> Iterator[Record]:
    """What is in the log, in its order."""
    with open(path, "rb") as file:
        while line := file.readline():
            head = json.loads(line)
            data = file.read(head.pop("bytes"))
            yield Record(data=data, **head)

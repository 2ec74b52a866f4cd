"""What a disk may hold after a power cut, made from the record of a `FaultFs`.

The model is a journalling file system that nobody asked to sync: names and sizes are kept up to some moment (the
journal's), data up to another, and of the data that was not synced any part may be there and any other not, down to
single sectors. What an fsync covered is there.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from tests.faultfs.log import Record

SECTOR = 512
NAMES = ("create", "mkdir", "rename", "unlink", "link")


@dataclass(slots=True)
class Files:
    """Names to file numbers, file numbers to contents; a file without a name is one that was unlinked."""

    names: dict[str, int] = field(default_factory=dict)
    contents: dict[int, bytearray] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)

    def apply_name(self, record: Record, number: int) -> None:
        match record.op:
            case "create":
                self.names[record.name] = number
                self.contents.setdefault(number, bytearray())
            case "mkdir":
                self.directories.append(record.name)
            case "rename":
                self.names[record.other] = self.names.pop(record.name)
            case "unlink":
                self.names.pop(record.name, None)
            case "link":
                self.names[record.other] = self.names[record.name]

    def apply_data(self, record: Record, number: int) -> None:
        content = self.contents.setdefault(number, bytearray())
        if record.op == "truncate":
            del content[record.offset :]
            content.extend(bytes(record.offset - len(content)))
            return
        content.extend(bytes(max(0, record.offset + len(record.data) - len(content))))
        content[record.offset : record.offset + len(record.data)] = record.data

    def write_to(self, directory: Path) -> None:
        """Make the files."""
        directory.mkdir(parents=True)
        for name in self.directories:
            (directory / name).mkdir(parents=True, exist_ok=True)
        for name, number in self.names.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.contents.get(number, b""))


class Recording:
    """A log, and to which file each of its records belongs."""

    def __init__(self, records: list[Record]) -> None:
        self.records = [record for record in records if record.op != "mark"]
        self.numbers: list[int] = []
        self._synced_by: list[int | None] = [None] * len(self.records)
        names: dict[str, int] = {}
        for at, record in enumerate(self.records):
            if record.op == "create":
                names[record.name] = at
            self.numbers.append(names.get(record.name, -1))
            if record.op == "rename":
                names[record.other] = names.pop(record.name)
            elif record.op == "unlink":
                names.pop(record.name, None)
            elif record.op == "link":
                names[record.other] = names[record.name]
        began_at = {number: at for at, number in enumerate(self._positions(records))}
        for at, record in enumerate(self.records):
            if record.op == "fsync":
                for before in range(at):
                    is_earlier = before < began_at.get(record.began, before + 1)
                    if self._synced_by[before] is None and is_earlier and self.numbers[before] == self.numbers[at]:
                        self._synced_by[before] = at

    @staticmethod
    def _positions(records: list[Record]) -> list[int]:
        """Of each record that is no mark, its place in the whole log."""
        return [place for place, record in enumerate(records) if record.op != "mark"]

    def cut(self, at: int) -> Files:
        """All of the first `at` records, and nothing of the others: the power went, all had been written."""
        return self._files(range(at), range(at), None)

    def torn(self, at: int, rng: random.Random) -> Files:
        """As `cut`, but of the last record some sectors are not there."""
        return self._files(range(at), range(at), rng, torn=at - 1)

    def scattered(self, at: int, rng: random.Random) -> Files:
        """As `cut`, but of what was not synced, names and sizes end at some moment, and any data is missing."""
        names_to = at
        while names_to and rng.random() < 0.97 and not self._is_synced(names_to - 1, at):
            names_to -= rng.choice([1, 1, 1, 2, 5, 20])
        share = rng.choice([0.0, 0.2, 0.5, 0.8, 0.95])
        there = [n for n in range(at) if self._is_synced(n, at) or rng.random() < share]
        return self._files(range(max(0, names_to)), there, rng)

    def _is_synced(self, record: int, at: int) -> bool:
        """Whether an fsync before `at` covered it. A sync of a file commits the journal, so the names before, too."""
        synced_by = self._synced_by[record]
        if self.records[record].op in NAMES:
            return any(one.op == "fsync" for one in self.records[record:at])
        return synced_by is not None and synced_by < at

    def _files(self, names: range, data: "range | list[int]", rng: random.Random | None, torn: int = -1) -> Files:
        files = Files()
        for at in names:
            if self.records[at].op in NAMES:
                files.apply_name(self.records[at], self.numbers[at])
        for at in data:
            record = self.records[at]
            if record.op not in ("write", "truncate"):
                continue
            is_torn = at == torn or (
                rng is not None and torn < 0 and rng.random() < 0.1 and not self._is_synced(at, 1 << 60)
            )
            for piece in _sectors(record, rng) if is_torn and rng is not None else [record]:
                files.apply_data(piece, self.numbers[at])
        return files


def _sectors(record: Record, rng: random.Random) -> list[Record]:
    """Some sectors of a write."""
    if record.op != "write":
        return [record] if rng.random() < 0.5 else []
    pieces = []
    at = 0
    while at < len(record.data):
        length = min(SECTOR - (record.offset + at) % SECTOR, len(record.data) - at)
        if rng.random() < 0.5:
            data = record.data[at : at + length]
            pieces.append(Record(op="write", name=record.name, offset=record.offset + at, data=data))
        at += length
    return pieces

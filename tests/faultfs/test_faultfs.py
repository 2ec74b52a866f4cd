"""The disk that lies: what the tests of basefs rely on."""

import errno
import mmap
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faultfs import ROOT, FaultFs
from tests.faultfs.log import records
from tests.faults.readers import errno_of, eventually

pytestmark = pytest.mark.mount


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultFs]:
    with FaultFs(backing=tmp_path / "disk", path=tmp_path / "cache", log=tmp_path / "log") as mounted:
        yield mounted


def test_what_is_written_is_on_the_disk_below_and_in_the_log(disk: FaultFs) -> None:
    file = disk.path / "a" / "file"
    file.parent.mkdir()
    with open(file, "wb", buffering=0) as out:
        out.write(b"first")
        os.fsync(out.fileno())
        os.pwrite(out.fileno(), b"second", 3)
        out.truncate(4)
    file.rename(disk.path / "b")
    (disk.path / "b").unlink()
    assert disk.log is not None
    assert [(one.op, one.name, one.offset, one.data or one.other) for one in records(disk.log)] == [
        ("mkdir", "a", 0, ""),
        ("create", "a/file", 0, ""),
        ("write", "a/file", 0, b"first"),
        ("fsync", "a/file", 0, ""),
        ("write", "a/file", 3, b"second"),
        ("truncate", "a/file", 4, ""),
        ("rename", "a/file", 0, "b"),
        ("unlink", "b", 0, ""),
    ]
    assert list(disk.backing.iterdir()) == [disk.backing / "a"]


def test_chosen_requests_fail_as_often_as_was_asked(disk: FaultFs) -> None:
    file = disk.path / "x.data"
    file.write_bytes(b"bytes")
    (disk.path / "other").write_bytes(b"bytes")
    rule = disk.fail("EIO", ops=["read"], names="*.data")
    assert errno_of(file.read_bytes) == errno.EIO
    assert (disk.path / "other").read_bytes() == b"bytes"
    disk.lift(rule)
    assert file.read_bytes() == b"bytes"
    once = disk.fail("ENOSPC", ops=["write"], times=1)
    assert errno_of(lambda: file.write_bytes(b"again")) == errno.ENOSPC
    file.write_bytes(b"again")
    assert disk.seen(once) == 1
    disk.lift()
    disk.read_only()
    assert errno_of(lambda: (disk.path / "new").write_bytes(b"")) == errno.EROFS
    assert errno_of(lambda: os.truncate(file, 1)) == errno.EROFS
    assert errno_of(lambda: os.rename(file, disk.path / "y")) == errno.EROFS


def test_a_flipped_byte_comes_from_the_disk_and_goes_with_the_rule(disk: FaultFs) -> None:
    file = disk.path / "file"
    file.write_bytes(b"\0" * 8192)
    rule = disk.flip(names="file")
    assert file.read_bytes() != b"\0" * 8192
    disk.lift(rule)
    assert file.read_bytes() == b"\0" * 8192


def test_a_hung_request_holds_up_nothing_else_and_goes_on_when_it_is_lifted(disk: FaultFs) -> None:
    file = disk.path / "file"
    file.write_bytes(b"here")
    rule = disk.hang(ops=["read"], names="file")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(file.read_bytes()))
    reader.start()
    eventually(lambda: disk.seen(rule) > 0)
    (disk.path / "other").write_bytes(b"other")
    assert (disk.path / "other").read_bytes() == b"other"
    assert got == []
    disk.lift(rule)
    reader.join()
    assert got == [b"here"]


def test_a_process_that_hangs_in_it_is_freed_when_it_is_closed(tmp_path: Path) -> None:
    with FaultFs(backing=tmp_path / "disk", path=tmp_path / "cache") as disk:
        file = disk.path / "file"
        file.write_bytes(b"here")
        rule = disk.hang(ops=["read"])
        reader = subprocess.Popen(["cat", file], stdout=subprocess.DEVNULL)
        eventually(lambda: disk.seen(rule) > 0)
        reader.kill()
    assert reader.wait(10) != 0


def test_it_goes_with_the_process_that_made_it(tmp_path: Path) -> None:
    program = (
        f"import pathlib, tests.faultfs as t; p = pathlib.Path({str(tmp_path)!r});"
        "d = t.FaultFs(backing=p / 'disk', path=p / 'cache'); print('up', flush=True); input()"
    )
    maker = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert maker.stdout is not None
    assert maker.stdin is not None
    assert maker.stdout.readline() == b"up\n"
    assert os.path.ismount(tmp_path / "cache")
    maker.kill()
    maker.communicate()
    eventually(lambda: not os.path.ismount(tmp_path / "cache"))


def test_a_shared_mapping_is_written_and_read_through_it(disk: FaultFs) -> None:
    with open(disk.path / "file", "w+b") as file:
        file.truncate(8192)
        with mmap.mmap(file.fileno(), 8192) as mapping:
            mapping[5000] = 7
            mapping.flush()
            assert (disk.backing / "file").read_bytes()[5000] == 7
            disk.drop_pages()
            assert mapping[5000] == 7


def test_sqlite_works_on_it(disk: FaultFs) -> None:
    for turn in range(2):
        db = sqlite3.connect(disk.path / "db", isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER)")
        db.execute("INSERT INTO t VALUES (?)", (turn,))
        assert db.execute("SELECT count(*) FROM t").fetchone() == (turn + 1,)
        db.close()


def test_the_free_space_is_what_was_claimed(disk: FaultFs) -> None:
    disk.claim_free(1 << 20)
    assert os.statvfs(disk.path).f_bavail * os.statvfs(disk.path).f_frsize == 1 << 20

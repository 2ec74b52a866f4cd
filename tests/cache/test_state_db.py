"""The state database keeps numbers for ever and state over restarts, whatever happens to the file."""

import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import trio

from basefs import errors
from basefs.cache import state_rows
from basefs.cache.state_db import StateDatabase
from basefs.cache.state_file import StateFile
from basefs.catalog.records import ImageEntry, Verdict
from basefs.core.link_record import LinkRecord
from basefs.core.names import base_name_of
from tests.cache.records import record
from tests.fakes.escrow import MemoryEscrow


async def until(condition) -> None:
    """Let (mock) time pass until something that a thread does has come about."""
    while not condition():  # noqa: ASYNC110  threads set no trio event
        await trio.sleep(0.5)


async def stored(path, numbers_from=0) -> dict[str, ImageEntry]:
    db = await StateDatabase.open(path, numbers_from=numbers_from)
    entries = await db.load()
    await db.close()
    return {entry.image_id: entry for entry in entries}


async def test_what_was_stored_comes_back(tmp_path):
    path = tmp_path / "state.sqlite"
    db = await StateDatabase.open(path, numbers_from=0)
    assert await db.load() == []
    numbers = await db.upsert([record("a"), record("b", name="ünï\N{GRINNING FACE}")], {"k": "v"})
    assert numbers == {"a": 1, "b": 2}
    entry = ImageEntry(number=1, base_name=base_name_of("a"), record=record("a"))
    entry.verdict = Verdict(state="refused", reason="because")
    entry.local.used_at_ns, entry.local.fetched_bytes, entry.is_gone = 7, 8, True
    db.touch(entry)
    await db.close()

    db = await StateDatabase.open(path, numbers_from=0)
    a, b = await db.load()
    assert await db.values() == {"k": "v", "next_number": "3", "generation": "2"}
    await db.close()
    assert (a.number, a.record, a.verdict, a.local, a.is_gone) == (1, record("a"), entry.verdict, entry.local, True)
    assert (b.number, b.record, b.verdict.state, b.is_gone) == (
        2,
        record("b", name="ünï\N{GRINNING FACE}"),
        "unchecked",
        False,
    )
    assert b.base_name == base_name_of("b")


async def test_what_was_begun_in_cinder_and_where_an_image_was_read_comes_back(tmp_path):
    path = tmp_path / "state.sqlite"
    db = await StateDatabase.open(path, numbers_from=0)
    await db.upsert([record("a"), record("b")], {})
    entry = ImageEntry(number=1, base_name=base_name_of("a"), record=record("a"))
    link = LinkRecord(
        stage="attached", volume_id="v", found_by="location", is_cloned=True, clone_tag="t", clone_id="c",
        attachments_before=("x", "y"), attachment_id="z", connector="iscsi", device="/dev/sda",
    )  # fmt: skip
    entry.local.link, entry.local.no_volume = link, "it has none"
    entry.local.locations = ("rbd://f/p/a/snap", "s3://h/b/a")
    await db.stored(entry)
    await db.close()
    kept = await stored(path)
    assert (kept["a"].local.link, kept["a"].local.no_volume) == (link, "it has none")
    assert (kept["b"].local.link, kept["b"].local.no_volume) == (None, None)
    assert (kept["a"].local.locations, kept["b"].local.locations) == (("rbd://f/p/a/snap", "s3://h/b/a"), ())


async def test_a_changed_record_keeps_its_number_and_its_local_state(tmp_path):
    path = tmp_path / "state.sqlite"
    db = await StateDatabase.open(path, numbers_from=0)
    await db.upsert([record("a")], {})
    entry = ImageEntry(number=1, base_name=base_name_of("a"), record=record("a"))
    entry.local.mtime_ns = 5
    db.touch(entry)
    await db.flush()
    assert await db.upsert([record("a", status="deactivated")], {}) == {"a": 1}
    await db.close()
    kept = (await stored(path))["a"]
    assert (kept.record.status, kept.local.mtime_ns) == ("deactivated", 5)


async def test_a_forgotten_images_number_is_not_used_again(tmp_path):
    path = tmp_path / "state.sqlite"
    db = await StateDatabase.open(path, numbers_from=0)
    await db.upsert([record("a"), record("b")], {})
    await db.forget(2)
    await db.close()
    db = await StateDatabase.open(path, numbers_from=0)
    assert await db.upsert([record("c")], {}) == {"c": 3}
    await db.close()
    assert set(await stored(path)) == {"a", "c"}


async def test_numbers_start_above_those_of_the_chunk_files(tmp_path):
    path = tmp_path / "state.sqlite"
    db = await StateDatabase.open(path, numbers_from=41)
    assert await db.upsert([record("a")], {}) == {"a": 42}
    await db.close()
    db = await StateDatabase.open(path, numbers_from=3)
    assert await db.upsert([record("b")], {}) == {"b": 43}
    await db.close()


@pytest.mark.parametrize(
    "damage",
    [
        "garbage",
        "truncated",
        "overwritten",
        "other version",
        "no table",
        "bad row",
        "bad json",
        "empty file with garbage wal",
    ],
)
async def test_a_damaged_file_is_set_aside_once_and_no_number_is_reused(tmp_path, caplog, damage, expected_warnings):
    path = tmp_path / "state.sqlite"
    db = await StateDatabase.open(path, numbers_from=0)
    await db.upsert([record(f"i{n}") for n in range(500)], {})
    await db.close()
    data = path.read_bytes()
    is_harmless = False
    if damage == "garbage":
        path.write_bytes(os.urandom(5000))
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "overwritten":
        path.write_bytes(data[:4096] + os.urandom(len(data) - 4096))
    elif damage == "empty file with garbage wal":
        path.write_bytes(b"")
        (tmp_path / "state.sqlite-wal").write_bytes(os.urandom(5000))
        is_harmless = True
    else:
        statement = {
            "other version": "PRAGMA user_version = 9",
            "no table": "DROP TABLE value",
            "bad row": "UPDATE image SET verdict = 'maybe' WHERE number = 7",
            "bad json": "UPDATE image SET record = '{' WHERE number = 7",
        }[damage]
        with sqlite3.connect(path) as connection:
            connection.execute(statement)
        connection.close()
    if not is_harmless:
        expected_warnings("is damaged and was set aside")
    db = await StateDatabase.open(path, numbers_from=500)
    assert await db.load() == []
    assert await db.upsert([record("new")], {}) == {"new": 501}
    await db.close()
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == (0 if is_harmless else 1)
    assert (tmp_path / "state.sqlite.damaged-1").exists() is not is_harmless
    assert set(await stored(path)) == {"new"}
    if not is_harmless:
        path.write_bytes(b"no database at all" * 100)
        assert await stored(path, 501) == {}
        assert (tmp_path / "state.sqlite.damaged-2").exists()


async def test_a_path_that_cannot_be_opened_is_a_cache_error(tmp_path):
    with pytest.raises(errors.CacheError, match="nowhere"):
        await StateDatabase.open(tmp_path / "nowhere" / "state.sqlite", numbers_from=0)
    (tmp_path / "dir").mkdir()
    with pytest.raises(errors.CacheError, match="dir"):
        await StateDatabase.open(tmp_path / "dir", numbers_from=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir"]


async def test_touched_state_is_written_together_after_a_second(tmp_path, autojump_clock, nursery, monkeypatch):
    path = tmp_path / "state.sqlite"
    db = await StateDatabase.open(path, numbers_from=0)
    await db.upsert([record("a"), record("b")], {})
    writes = []
    flush = StateDatabase.flush

    async def counted(self):
        began_at, dirty = trio.current_time(), len(self._dirty)
        await flush(self)
        writes.append((began_at, dirty))

    monkeypatch.setattr(StateDatabase, "flush", counted)
    nursery.start_soon(db.run)
    began_at = trio.current_time()
    for number, image_id in ((1, "a"), (2, "b"), (1, "a")):
        entry = ImageEntry(number=number, base_name=base_name_of(image_id), record=record(image_id))
        db.touch(entry)
        await trio.sleep(0.1)
    await until(lambda: writes)
    await trio.sleep(10)
    assert [(at - began_at, dirty) for at, dirty in writes] == [(pytest.approx(1.0, abs=0.01), 2)]
    db.touch(entry)
    await until(lambda: len(writes) == 2)
    await db.close()
    nursery.cancel_scope.cancel()


async def test_a_disk_that_takes_nothing_costs_one_warning_and_no_state(
    tmp_path, autojump_clock, nursery, caplog, monkeypatch, expected_warnings
):
    expected_warnings("state of images cannot be stored on the disk, trying again: .*full")
    caplog.set_level(logging.INFO)
    path = tmp_path / "state.sqlite"
    db = await StateDatabase.open(path, numbers_from=0)
    await db.upsert([record("a")], {})
    connect = StateFile._connect

    def full(file: StateFile) -> sqlite3.Connection:
        connection = connect(file)
        connection.execute("PRAGMA max_page_count = 1")
        return connection

    monkeypatch.setattr(StateFile, "_connect", full)
    db._file._db.execute("PRAGMA max_page_count = 1")
    entry = ImageEntry(number=1, base_name=base_name_of("a"), record=record("a"))
    entry.local.source_reason = "x" * 100_000
    db.touch(entry)
    nursery.start_soon(db.run)
    await until(lambda: caplog.records)
    await trio.sleep(60)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert await db.upsert([record("b", name="x" * 100_000)], {}) == {"b": 2}
    monkeypatch.setattr(StateFile, "_connect", connect)
    await until(lambda: len(caplog.records) > 1)
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    await db.close()
    nursery.cancel_scope.cancel()
    kept = await stored(path)
    assert (kept["a"].local.source_reason, kept["b"].number) == ("x" * 100_000, 2)


WRITER = """
import sys, trio
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from basefs.cache.state_db import StateDatabase
from tests.cache.records import record
from tests.fakes.escrow import MemoryEscrow
async def main():
    db = await StateDatabase.open(Path(sys.argv[1]), numbers_from=0)
    taken = len(await db.load())
    while True:
        numbers = await db.upsert([record(f"i{taken}")], {"last": str(taken)})
        print(f"i{taken}", numbers[f"i{taken}"], flush=True)
        taken += 1
trio.run(main)
"""


async def test_kill_9_loses_no_number_that_was_told(tmp_path):
    path, told = tmp_path / "state.sqlite", {}
    for _ in range(3):
        with subprocess.Popen(  # noqa: ASYNC220  nothing else runs in this loop
            [sys.executable, "-c", WRITER, str(path), os.getcwd()], stdout=subprocess.PIPE, text=True
        ) as writer:
            for _ in range(50):
                image_id, number = writer.stdout.readline().split()
                told[image_id] = int(number)
            writer.send_signal(signal.SIGKILL)
            for line in writer.stdout:
                if line.endswith("\n"):
                    image_id, number = line.split()
                    told[image_id] = int(number)
    entries = await stored(path)
    assert {image_id: entries[image_id].number for image_id in told} == told
    assert len({entry.number for entry in entries.values()}) == len(entries) >= 150


@pytest.mark.timed
async def test_a_thousand_entries_load_within_a_fifth_of_a_second(tmp_path):
    # Of processor time: what others take of the machine is not ours.
    path = tmp_path / "state.sqlite"
    db = await StateDatabase.open(path, numbers_from=0)
    await db.upsert([record(f"5c3f1f0e-{n:027}", os_hash_value="a" * 128) for n in range(1000)], {})
    await db.close()
    times = []
    for _ in range(3):
        began = time.process_time()
        assert len(await stored(path)) == 1000
        times.append(time.process_time() - began)
    assert min(times) < 0.2


def test_the_schema_is_that_of_its_version():
    """Change SCHEMA_VERSION with the schema: an older basefs must not misread a newer file."""
    assert state_rows.SCHEMA_VERSION == 1
    assert "".join(state_rows._SCHEMA.split()) == (
        "CREATETABLEimage(numberINTEGERPRIMARYKEY,image_idTEXTNOTNULLUNIQUE,recordTEXTNOTNULL,"
        "verdictTEXTNOTNULLDEFAULT'unchecked',reasonTEXT,localTEXTNOTNULLDEFAULT'{}',is_goneINTEGERNOTNULLDEFAULT0)"
        "STRICT;CREATETABLEvalue(keyTEXTPRIMARYKEY,valueTEXTNOTNULL)STRICT;"
    )


async def test_what_changed_is_in_escrow_and_the_next_server_begins_with_it(tmp_path, nursery, expected_warnings):
    expected_warnings("state of images cannot be stored on the disk")
    path, escrow = tmp_path / "disk" / "state.sqlite", MemoryEscrow()
    path.parent.mkdir()
    db = await StateDatabase.open(path, numbers_from=0, escrow=escrow)
    nursery.start_soon(db.run)
    await db.upsert([record("a")], {})
    entry = ImageEntry(number=1, base_name=base_name_of("a"), record=record("a"))
    for mtime_ns in (5, 6, 7):
        entry.local.mtime_ns = mtime_ns
        await db.stored(entry)
    nursery.cancel_scope.cancel()
    shutil.rmtree(path.parent)
    with trio.CancelScope(shield=True):
        (held,) = escrow.held()
        after = await StateDatabase.open(path, numbers_from=0, held=held, escrow=escrow)
        (kept,) = await after.load()
        assert (kept.number, kept.local.mtime_ns) == (1, 7)
        assert await after.upsert([record("b")], {}) == {"b": 2}
        await db.close()
        await after.close()
    escrow.close()

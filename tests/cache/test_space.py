"""The accountant: both limits, before each write, in allocated blocks."""

import os
import threading
from pathlib import Path

import pytest

from basefs import errors
from basefs.cache.space import CacheLimits, CacheSpace, Room, transfer_cost

MIB = 1 << 20


def space_of(directory: Path, **limits: int) -> CacheSpace:
    space = CacheSpace(directory, directory, CacheLimits(**limits))
    space.count()
    return space


def test_what_is_there_at_the_start_counts_without_its_holes(tmp_path: Path) -> None:
    with (tmp_path / "42.data").open("wb") as file:
        file.truncate(100 * MIB)
        file.write(bytes(MIB))
    (tmp_path / "42.map").write_bytes(bytes(4096))
    (tmp_path / "state.sqlite").write_bytes(bytes(8192))
    space = space_of(tmp_path)
    assert space.allocated(42) == MIB + 4096
    assert space.report().allocated_bytes == MIB + 4096 + 8192


def test_nothing_more_is_granted_than_the_limit_whatever_is_under_way(tmp_path: Path) -> None:
    space = space_of(tmp_path, max_bytes=16 * MIB)
    granted = 0
    while space.reserve(MIB, Room(0)):
        granted += MIB
    assert 13 * MIB <= granted < 16 * MIB
    space.settle(1, MIB, lambda: 4096)
    assert space.reserve(MIB, Room(0)), "a write that cost less than was reserved gives the rest back"


def test_room_that_was_promised_is_there_and_nobody_elses(tmp_path: Path) -> None:
    space = space_of(tmp_path, max_bytes=16 * MIB)
    room = space.promise(transfer_cost(14 * MIB))
    assert room is not None
    assert not space.reserve(2 * MIB, Room(0))
    assert all(space.reserve(MIB, room) for _ in range(14))
    assert not space.reserve(2 * MIB, room)
    space.give_back(room)


def test_writes_wait_for_the_count(tmp_path: Path) -> None:
    space = CacheSpace(tmp_path, tmp_path, CacheLimits(max_bytes=16 * MIB))
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(space.reserve(MIB, Room(0))))
    thread.start()
    assert results == []
    space.count()
    thread.join(10)
    assert results == [True]


def test_the_disk_is_left_what_it_is_to_be_left(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    assert not space_of(tmp_path, min_free_bytes=free + 100 * MIB).reserve(MIB, Room(0))
    assert space_of(tmp_path, min_free_bytes=free // 2).reserve(MIB, Room(0))
    assert space_of(tmp_path, min_free_bytes=free + 100 * MIB).promise(MIB) is None


def test_a_disk_that_does_not_say_leaves_the_last_word(tmp_path: Path) -> None:
    def fails() -> int:
        raise errors.CacheError("EIO")

    space = space_of(tmp_path, max_bytes=16 * MIB)
    assert space.reserve(MIB, Room(0))
    space.settle(1, MIB, lambda: MIB)
    assert space.reserve(MIB, Room(0))
    space.settle(1, MIB, fails)
    assert space.allocated(1) == MIB
    space.forget(1)
    assert space.report().allocated_bytes == 0


def test_a_directory_that_cannot_be_counted_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basefs.cache.space.COUNT_WAIT_S", 0.01)
    space = CacheSpace(tmp_path, tmp_path / "gone", CacheLimits(max_bytes=16 * MIB))
    with pytest.raises(errors.CacheError):
        space.count()
    assert not space.reserve(1, Room(0))

"""Which images have overlays, whatever stands under instances_path, and whoever wrote it."""

import os
import struct
import subprocess
from pathlib import Path

import pytest
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from basefs.cache import overlays
from basefs.cache.overlays import SCAN_EVERY_S, OverlayScan, OverlayWatch, scan_overlays
from basefs.core.qcow2_header import HEADER_BYTES, MAGIC, NAME_BYTES_MAX, backing_name, base_names_in
from tests.conftest import ExpectedWarnings

BASE = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


def overlay_on(path: Path, base: str) -> Path:
    """A real overlay, as nova makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            "qemu-img",
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-o",
            f"backing_file={base},backing_fmt=raw",
            str(path),
            "1M",
        ],
        check=True,
    )
    return path


def users(instances: Path, *skipped: str) -> dict[str, list[str]]:
    scan = scan_overlays(instances, frozenset(skipped))
    assert scan.problem is None
    return {base: sorted(found) for base, found in scan.users.items()}


def test_overlays_are_found_where_nova_has_them(tmp_path: Path) -> None:
    for name in ("a/disk", "b_resize/disk.local", "c_del/disk", "d/disk.rescue"):
        overlay_on(tmp_path / name, f"/var/lib/nova/instances/_base/{BASE}")
    overlay_on(tmp_path / "e/disk", f"/x/_base/{OTHER}_20")
    overlay_on(tmp_path / "f/not-a-disk", f"/x/_base/{OTHER}")
    overlay_on(tmp_path / "disk", f"/x/_base/{OTHER}")
    (tmp_path / "g").mkdir()
    (tmp_path / "g/disk").write_bytes(os.urandom(100_000))
    (tmp_path / "g/disk.config").write_bytes(b"")
    assert users(tmp_path) == {
        BASE: ["a/disk", "b_resize/disk.local", "c_del/disk", "d/disk.rescue"],
        OTHER: ["e/disk"],
    }


def test_links_fifos_and_what_is_skipped_are_not_opened(tmp_path: Path) -> None:
    outside = overlay_on(tmp_path / "outside/disk", f"/x/{OTHER}")
    instances = tmp_path / "instances"
    overlay_on(instances / "a/disk", f"/x/{BASE}")
    (instances / "a/disk.local").symlink_to(outside)
    (instances / "b").symlink_to(outside.parent)
    os.mkfifo(instances / "a/disk.eph0")
    os.mknod(instances / "a/disk.swap", 0o600 | 0o020000, os.makedev(1, 5))
    overlay_on(instances / "_base/disk", f"/x/{OTHER}")
    assert users(instances, f"{instances}/_base") == {BASE: ["a/disk"]}


@given(st.binary(max_size=200) | st.binary(max_size=120).map(lambda tail: MAGIC + tail))
def test_whatever_a_header_holds_the_answer_is_a_place_within_the_first_cluster(header: bytes) -> None:
    try:
        where = backing_name(header)
    except ValueError:
        return
    assert where is None or (where.offset >= HEADER_BYTES and 0 < where.length <= NAME_BYTES_MAX)


@given(version=st.integers(0, 9), offset=st.integers(0, 1 << 22), length=st.integers(0, 2000), bits=st.integers(0, 40))
def test_a_place_that_cannot_be_is_refused(version: int, offset: int, length: int, bits: int) -> None:
    header = struct.pack(">4sIQII", MAGIC, version, offset, length, bits).ljust(HEADER_BYTES, b"\0")
    try:
        where = backing_name(header)
    except ValueError:
        return
    assert version in (2, 3)
    assert 9 <= bits <= 21
    assert (where is None) == (offset == 0)
    assert where is None or where.offset + where.length <= 1 << bits


def test_a_description_in_json_is_understood_too() -> None:
    name = b'json:{"driver":"raw","file":{"driver":"file","filename":"/x/_base/' + BASE.encode() + b'"}}'
    assert base_names_in(name) == {BASE}
    assert base_names_in(f"/{OTHER}/{BASE}".encode()) == {BASE}
    assert base_names_in(f"/x/{OTHER}a".encode()) == set()


async def test_a_look_that_fails_keeps_what_was_known(
    tmp_path: Path,
    clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    expected_warnings: ExpectedWarnings,
) -> None:
    scans = [
        OverlayScan(users={}, problem="/i: Input/output error"),
        OverlayScan(users={BASE: ["a/disk"]}),
        OverlayScan(users={OTHER: ["b/disk"]}, problem="/i: Input/output error"),
        OverlayScan(users={OTHER: ["b/disk"]}),
    ]
    expected_warnings("not all overlays can be seen")
    monkeypatch.setattr(overlays, "_scan", lambda *_: scans.pop(0))
    watch = OverlayWatch(tmp_path, tmp_path / "_base")
    seen = []
    for _ in range(4):
        await watch._look()
        seen.append((watch.is_known, watch.users(BASE), watch.users(OTHER)))
    assert seen == [
        (False, [], []),
        (True, ["a/disk"], []),
        (True, ["a/disk"], ["b/disk"]),
        (True, [], ["b/disk"]),
    ]


async def test_who_asks_gets_a_look_that_is_fresh(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    watch = OverlayWatch(tmp_path, tmp_path / "_base")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await watch.refresh()
        overlay_on(tmp_path / "a/disk", f"/x/{BASE}")
        await trio.sleep(overlays.FRESH_S + 1)
        await watch.refresh()
        assert watch.users(BASE) == ["a/disk"]
        nursery.cancel_scope.cancel()


async def test_who_must_know_all_gets_a_look_that_was_begun_after_the_call(
    tmp_path: Path, clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("not all overlays can be seen")
    instances = tmp_path / "instances"
    instances.mkdir()
    watch = OverlayWatch(instances, tmp_path / "mount")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await watch.refresh()
        overlay_on(instances / "a/disk", f"/x/{BASE}")
        assert await watch.see_all()
        assert watch.users(BASE) == ["a/disk"]
        instances.rename(tmp_path / "away")
        assert not await watch.see_all()
        nursery.cancel_scope.cancel()


async def test_a_look_that_is_asked_for_is_not_a_minute_away(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    overlay_on(tmp_path / "a/disk", f"/x/{BASE}")
    watch = OverlayWatch(tmp_path, Path("/nowhere"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await watch.refresh()
        (tmp_path / "a/disk").unlink()
        looked = trio.Event()
        watch.looked = looked.set
        watch.look_soon()
        begun = trio.current_time()
        await looked.wait()
        assert trio.current_time() - begun < SCAN_EVERY_S / 2
        assert not watch.users(BASE)
        nursery.cancel_scope.cancel()

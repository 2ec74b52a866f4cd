"""The gate before a name: what is let through, what is refused, and what is not known now."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import get_args

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.catalog.records import ImageEntry, Verdict, WholeState
from basefs.handlers.gate import NO_VOLUME_AGAIN_S, ServableGate
from tests.cache.conftest import IMAGE_ID, make_entry
from tests.cache.memory_source import MemorySource

RAW = bytes(range(256)) * 8192  # 2 MiB without a signature of any format
QCOW2 = b"QFI\xfb" + bytes(3) + b"\x03" + bytes(1 << 20)


class _Handler:
    """Keeps the headers it was given."""

    name = "fake"

    def __init__(self) -> None:
        self.headers: list[bytes] = []

    async def keep_header(self, entry: ImageEntry, header: bytes) -> None:
        self.headers.append(header)


@pytest.fixture
def handler() -> _Handler:
    return _Handler()


@pytest.fixture
async def nursery() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


def gate_over(
    source: MemorySource,
    handler: _Handler,
    nursery: trio.Nursery,
    view: str = "raw",
    require_verified: bool = False,
    find_volume: Callable[[ImageEntry], Awaitable[None]] | None = None,
) -> ServableGate:
    return ServableGate(
        source, handler, nursery, lambda _entry: None, view=view, verify_signatures=False, header_bytes=65536,
        require_verified=require_verified, is_in_use=lambda entry: entry.local.pinned,
        find_volume=find_volume,
    )  # fmt: skip  # type: ignore[arg-type]


async def test_a_raw_image_is_let_through_and_its_header_is_kept(handler: _Handler, nursery: trio.Nursery) -> None:
    source, entry = MemorySource({IMAGE_ID: RAW}), make_entry(len(RAW))
    await gate_over(source, handler, nursery).let_through(entry, deadline_s=5)
    assert entry.verdict.state == "servable"
    assert entry.local.source_kind == "ranged"
    assert handler.headers == [RAW[: 1 << 20]]


async def test_a_verdict_is_made_once(handler: _Handler, nursery: trio.Nursery) -> None:
    source, entry = MemorySource({IMAGE_ID: RAW}), make_entry(len(RAW))
    gate = gate_over(source, handler, nursery)
    for _ in range(3):
        await gate.let_through(entry, deadline_s=5)
    assert source.requests == 1


async def test_many_lookups_of_an_unchecked_image_make_one_probe(handler: _Handler, nursery: trio.Nursery) -> None:
    source, entry = MemorySource({IMAGE_ID: RAW}), make_entry(len(RAW))
    gate = gate_over(source, handler, nursery)
    async with trio.open_nursery() as lookups:
        for _ in range(50):
            lookups.start_soon(lambda: gate.let_through(entry, deadline_s=5))
    assert source.requests == 1


async def test_a_raw_image_whose_bytes_are_a_qcow2_stays_hidden(handler: _Handler, nursery: trio.Nursery) -> None:
    source, entry = MemorySource({IMAGE_ID: QCOW2}), make_entry(len(QCOW2))
    gate = gate_over(source, handler, nursery)
    with pytest.raises(errors.ImageRefusedError, match="qcow2"):
        await gate.let_through(entry, deadline_s=5)
    assert handler.headers == []
    assert gate.verdict(entry).state == "refused"


@pytest.mark.parametrize("disk_format", ["vmdk", "vdi", "vhd", "vhdx", "ploop", "luks", None])
async def test_a_format_that_is_not_shown_is_refused_without_asking_glance(
    disk_format: str | None, handler: _Handler, nursery: trio.Nursery
) -> None:
    source, entry = MemorySource({IMAGE_ID: RAW}), make_entry(len(RAW), disk_format=disk_format)
    with pytest.raises(errors.ImageRefusedError):
        await gate_over(source, handler, nursery).let_through(entry, deadline_s=5)
    assert source.requests == 0


async def test_glance_away_is_not_a_verdict(
    handler: _Handler, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    source, entry = MemorySource({IMAGE_ID: RAW}), make_entry(len(RAW))
    source.faults = [errors.SourceUnavailableError("503")] * 100
    gate = gate_over(source, handler, nursery)
    with pytest.raises((errors.SourceUnavailableError, errors.DeadlineExceededError)):
        await gate.let_through(entry, deadline_s=5)
    assert entry.verdict.state == "unchecked"
    source.faults = []
    await gate.let_through(entry, deadline_s=5)


async def test_one_failure_is_tried_through(
    handler: _Handler, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    source, entry = MemorySource({IMAGE_ID: RAW}), make_entry(len(RAW))
    source.faults = [errors.SourceUnavailableError("503")]
    await gate_over(source, handler, nursery).let_through(entry, deadline_s=5)
    assert source.requests == 2


@pytest.mark.parametrize("error", [errors.SourceForbiddenError("403"), errors.SourceCorruptError("204, no body")])
async def test_what_glance_does_not_give_us_is_left_to_nova(
    error: errors.SourceError, handler: _Handler, nursery: trio.Nursery
) -> None:
    source, entry = MemorySource({IMAGE_ID: RAW}), make_entry(len(RAW))
    source.faults = [error]
    with pytest.raises(errors.ImageRefusedError):
        await gate_over(source, handler, nursery).let_through(entry, deadline_s=5)
    assert entry.verdict.state == "unchecked", "nothing is remembered that may change"


async def test_a_deleted_image_is_refused_unless_all_of_it_is_here(handler: _Handler, nursery: trio.Nursery) -> None:
    entry = make_entry(len(RAW))
    entry.verdict = Verdict(state="servable")
    entry.is_gone = True
    gate = gate_over(MemorySource({}), handler, nursery)
    assert gate.verdict(entry).state == "refused"
    entry.local.cached_bytes = len(RAW)
    assert gate.verdict(entry).state == "servable"


async def test_a_deactivated_image_stays_for_those_who_used_it_here(handler: _Handler, nursery: trio.Nursery) -> None:
    entry = make_entry(len(RAW))
    entry.verdict = Verdict(state="servable")
    entry.record = replace(entry.record, status="deactivated")
    gate = gate_over(MemorySource({}), handler, nursery)
    assert gate.verdict(entry).state == "refused"
    entry.local.used_at_ns = 1
    assert gate.verdict(entry).state == "servable"


def whole_entry(whole: WholeState, *, pinned: bool = False) -> ImageEntry:
    entry = make_entry(len(RAW))
    entry.verdict = Verdict(state="servable")
    entry.local.whole, entry.local.pinned = whole, pinned
    return entry


@pytest.mark.parametrize("require_verified", [False, True])
@pytest.mark.parametrize("is_in_use", [False, True])
@pytest.mark.parametrize("whole", get_args(WholeState))
async def test_what_an_image_is_as_a_whole_hides_it_only_while_it_is_not_in_use(
    whole: WholeState, is_in_use: bool, require_verified: bool, handler: _Handler, nursery: trio.Nursery
) -> None:
    gate = gate_over(MemorySource({}), handler, nursery, require_verified=require_verified)
    entry = whole_entry(whole, pinned=is_in_use)
    is_shown = is_in_use or (whole == "verified" if require_verified else whole != "quarantined")
    assert (gate.verdict(entry).state == "servable") == is_shown
    await gate.let_through(entry, deadline_s=5, for_warming=True)
    if is_shown:
        await gate.let_through(entry, deadline_s=5)
    else:
        with pytest.raises(errors.ImageRefusedError, match=r"basefs image|no hash"):
            await gate.let_through(entry, deadline_s=5)


class _Volumes:
    """Finds a volume, or raises what it is told."""

    def __init__(self) -> None:
        self.error: errors.BasefsError | None = None
        self.calls = 0

    async def find(self, entry: ImageEntry) -> None:
        await trio.lowlevel.checkpoint()
        self.calls += 1
        if self.error is not None:
            raise self.error


async def test_where_only_volumes_are_shown_an_image_without_one_is_refused_and_looked_at_again(
    handler: _Handler, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    source, entry, volumes = MemorySource({IMAGE_ID: RAW}), make_entry(len(RAW)), _Volumes()
    gate = gate_over(source, handler, nursery, find_volume=volumes.find)
    volumes.error = errors.NoVolumeError("it is in the file store")
    for _ in range(2):
        with pytest.raises(errors.ImageRefusedError, match="volume-linking: it is in the file store"):
            await gate.let_through(entry, deadline_s=5)
    assert (volumes.calls, source.requests) == (1, 0), "found out once, and nothing was fetched"
    assert gate.refused_reason(entry) == "template_image_handler is volume-linking: it is in the file store"
    entry.local.pinned = True
    assert gate.verdict(entry).state == "unchecked", "what is in use is not hidden"
    entry.local.pinned = False
    other = gate_over(source, handler, nursery)
    await other.let_through(entry, deadline_s=5)  # template_image_handler = auto
    with pytest.raises(errors.ImageRefusedError):
        await gate.let_through(entry, deadline_s=5)
    volumes.error = None
    await trio.sleep(NO_VOLUME_AGAIN_S)
    await gate.let_through(entry, deadline_s=5)
    assert (entry.verdict.state, entry.local.no_volume) == ("servable", "")
    assert volumes.calls == 3, "at first, after another server (each looks anew), and when it was time"


async def test_where_only_volumes_are_shown_unknown_is_not_absent(handler: _Handler, nursery: trio.Nursery) -> None:
    source, entry, volumes = MemorySource({IMAGE_ID: RAW}), make_entry(len(RAW)), _Volumes()
    gate = gate_over(source, handler, nursery, find_volume=volumes.find)
    volumes.error = errors.VolumeError("Cinder is away")
    with pytest.raises(errors.SourceUnavailableError, match="Cinder is away"):
        await gate.let_through(entry, deadline_s=5)
    volumes.error = None
    await gate.let_through(entry, deadline_s=5)
    assert handler.headers == [RAW[: 1 << 20]]

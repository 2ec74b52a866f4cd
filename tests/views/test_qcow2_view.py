"""What a view does beside the right bytes: few round trips, work done once, nothing stale, waits that end."""

import gc

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.concurrency.gather import gather
from basefs.views import qcow2_clusters
from basefs.views.choice import Views
from basefs.views.qcow2_memory import Qcow2Memory
from basefs.views.stored import StoredView
from tests.cache.conftest import make_entry
from tests.views.conftest import entry_of, read, view_of
from tests.views.memory_stored import MemoryStored
from tests.views.qcow2_files import MIB, create, io
from tests.views.qcow2_writer import Cluster, Shape, Writer

CLUSTER = 65536
PACKED = Writer(Shape(), [Cluster(kind="packed", seed=seed) for seed in range(24)])
DATA = Writer(Shape(seed=3), [Cluster(kind="data", seed=seed) for seed in range(24)])


@pytest.fixture
def inflations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clusters each thread inflated."""
    counts = []
    inflated = qcow2_clusters._inflated

    def count(image_id, layout, packed):
        counts.append(len(packed))
        return inflated(image_id, layout, packed)

    monkeypatch.setattr(qcow2_clusters, "_inflated", count)
    return counts


async def test_the_first_read_of_a_large_image_takes_few_round_trips(tmp_path):
    path = tmp_path / "image"
    create(path, "preallocation=off", size=20 << 30)
    io(path, "write -P 1 0 1M", "write -P 2 10G 1M", "write -P 3 19G 64k")
    for header_bytes, rounds in ((MIB, 2), (0, 4)):  # what the gate kept; nothing
        stored = MemoryStored(path.read_bytes())
        stored.warm_up(header_bytes)
        view = view_of(stored)
        assert await read(view, 10 << 30, MIB) == b"\2" * MIB
        assert stored.rounds <= rounds
        assert await read(view, 19 << 30, CLUSTER) == b"\3" * CLUSTER
        assert stored.rounds <= rounds + 2


async def test_all_pieces_of_a_read_come_side_by_side():
    stored = MemoryStored(DATA.data)
    stored.warm_up(5 * CLUSTER)
    view = view_of(stored)
    assert await read(view, 0, 1) == DATA.disk[:1]
    stored.rounds = 0
    assert await read(view, 0, 16 * CLUSTER) == DATA.disk[: 16 * CLUSTER]
    assert stored.rounds == 1


async def test_a_hit_needs_no_await_and_the_stored_bytes_only():
    stored = MemoryStored(DATA.data)
    view = view_of(stored)
    assert view.hit(0, 4096) is None
    assert await read(view, 0, 4096) == DATA.disk[:4096]
    assert bytes(view.hit(0, 4096) or b"") == DATA.disk[:4096]
    assert view.hit(0, 16 * CLUSTER) is None, "only some of it is here"
    stored.warm_up()
    assert bytes(view.hit(100, 16 * CLUSTER - 100) or b"") == DATA.disk[100 : 16 * CLUSTER]
    assert view.hit(0, 2 * MIB) is None, "more than the kernel asks for"
    assert bytes(view.hit(len(DATA.disk) - 10, 4096) or b"") == DATA.disk[-10:]


async def test_zeros_are_hits_and_ask_nobody():
    file = Writer(Shape(), [Cluster(kind="data", seed=1), *[Cluster(kind="zero")] * 40])
    stored = MemoryStored(file.data)
    view = view_of(stored)
    await read(view, 0, 1)
    stored.reads.clear()
    for size in (1, 4096, MIB):
        assert bytes(view.hit(2 * CLUSTER, size) or b"") == bytes(size)
    assert await view.read(CLUSTER, MIB, deadline_s=1, patient=False) == bytes(MIB)
    assert stored.reads == []


async def test_a_compressed_cluster_is_inflated_once_however_many_want_it(inflations):
    stored = MemoryStored(PACKED.data)
    stored.hold = trio.Event()
    view = view_of(stored)

    async def reader(offset: int) -> None:
        assert await read(view, offset, 4096) == PACKED.disk[offset : offset + 4096]

    async with trio.open_nursery() as nursery:
        for at in range(40):
            nursery.start_soon(reader, at * 1000)
        await trio.testing.wait_all_tasks_blocked()
        stored.hold.set()
    assert sum(inflations) == 1
    assert bytes(view.hit(5, 100) or b"") == PACKED.disk[5:105], "it is kept"
    assert await read(view, 0, len(PACKED.disk)) == PACKED.disk
    assert sum(inflations) == 24


async def test_who_waits_for_anothers_cluster_looks_again_when_that_one_gives_up():
    stored = MemoryStored(PACKED.data)
    view = view_of(stored)
    await read(view, 0, 1)
    stored.hold = trio.Event()
    stored.warm.clear()
    done = []

    async def reader() -> None:
        assert await view.read(3 * CLUSTER, 10, deadline_s=5, patient=True) == PACKED.disk[3 * CLUSTER :][:10]
        done.append(True)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as first:
            async with trio.open_nursery() as inner:
                inner.start_soon(lambda: view.read(3 * CLUSTER, 10, deadline_s=5, patient=False))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(reader)
                await trio.testing.wait_all_tasks_blocked()
                first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        stored.hold.set()
    assert done == [True]


async def test_who_waits_for_anothers_cluster_waits_no_longer_than_it_would_alone(autojump_clock):
    stored = MemoryStored(PACKED.data)
    view = view_of(stored)
    await read(view, 0, 1)
    stored.hold = trio.Event()
    stored.warm.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: view.read(3 * CLUSTER, 10, deadline_s=500, patient=True))
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        with pytest.raises(errors.DeadlineExceededError):
            await view.read(3 * CLUSTER, 10, deadline_s=5, patient=False)
        assert trio.current_time() - began == pytest.approx(5)
        stored.hold.set()


async def test_an_error_of_the_stored_bytes_is_the_readers_and_is_not_remembered():
    stored = MemoryStored(PACKED.data)
    view = view_of(stored)
    stored.error = errors.SourceUnavailableError("503")
    for offset in (0, 5 * CLUSTER):
        with pytest.raises(errors.SourceUnavailableError, match="503"):
            await read(view, offset, MIB)
    stored.error = None
    assert await read(view, 0, MIB) == PACKED.disk[:MIB]


async def test_what_is_forgotten_while_it_is_on_its_way_is_not_kept():
    """The bytes that were read may be the damaged ones."""
    views = Views("raw")
    for file in (DATA, PACKED):
        good, entry = file.data, entry_of(file.data)
        stored = MemoryStored(good)
        view = view_of(stored, entry, views)
        await read(view, 0, 1)
        views.forget(entry)
        assert view.hit(0, 1) is None
        stored.hold = trio.Event()
        stored.warm.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda view=view: view.read(0, 1, deadline_s=5, patient=False))
            await trio.testing.wait_all_tasks_blocked()
            views.forget(entry)
            stored.hold.set()
        assert views._memory.of(entry.number).layout is None
        assert await read(view, 0, MIB) == file.disk[:MIB]
        assert view.hit(0, CLUSTER) is not None
        views.forget(entry)


async def test_images_do_not_see_each_others_memory():
    views = Views("raw")
    shown = [view_of(MemoryStored(file.data), entry_of(file.data, n), views) for n, file in ((1, DATA), (2, PACKED))]
    for _ in range(2):
        for view, file in zip(shown, (DATA, PACKED), strict=True):
            assert await read(view, 0, MIB) == file.disk[:MIB]
    views.forget(entry_of(DATA.data, 1))
    assert shown[0].hit(0, 10) is None
    assert bytes(shown[1].hit(0, 10) or b"") == PACKED.disk[:10]


async def test_a_header_that_says_another_size_than_the_gate_found_is_an_error():
    entry = entry_of(DATA.data)
    entry.local.shown_size = 12 * CLUSTER
    view = view_of(MemoryStored(DATA.data), entry)
    with pytest.raises(errors.ImageDamagedError, match="its disk has 1572864 bytes, and had 786432"):
        await read(view, 0, 10)


def test_the_memory_of_an_image_nobody_has_goes():
    memory = Qcow2Memory()
    kept = memory.of(1)
    assert memory.of(1) is kept
    del kept
    gc.collect()
    assert len(memory._images) == 0


def test_only_qcow2_images_have_a_raw_view():
    stored = MemoryStored(DATA.data)
    assert isinstance(Views("raw").of(make_entry(len(DATA.data)), stored), StoredView)
    assert isinstance(Views("stored").of(entry_of(DATA.data), stored), StoredView)


# --- gather ----------------------------------------------------------------------------------------------


async def test_gather_gives_the_results_in_order_and_runs_so_many_at_once(autojump_clock):
    running, most = 0, 0

    async def call(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(10 - number % 10)
        running -= 1
        return number

    calls = [lambda number=number: call(number) for number in range(20)]
    assert await gather(calls, at_once_max=4) == list(range(20))
    assert most == 4
    assert await gather([]) == []


async def test_gather_raises_one_plain_error_and_ends_the_others(autojump_clock):
    ended = []

    async def fails() -> None:
        await trio.sleep(1)
        raise errors.SourceUnavailableError("503")

    async def waits() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(True)

    with pytest.raises(errors.SourceUnavailableError, match="503"):
        await gather([waits, fails, fails, waits])
    assert ended == [True, True]

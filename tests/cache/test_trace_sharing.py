"""Boot traces through Glance: when one is given and when taken, and that nothing waits for it."""

import dataclasses
from pathlib import Path

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.cache.trace_sharing import AGAIN_S, SPREAD_S, TraceSharing
from basefs.cache.trace_store import TraceStore, traced_image
from basefs.catalog.records import ImageEntry
from basefs.concurrency.threads import BlockingCalls
from basefs.core.boot_trace import BootTrace, TraceRecording
from basefs.core.trace_property import property_of
from tests.cache.conftest import make_entry
from tests.conftest import ExpectedWarnings

SIZE = 1 << 30


class Glance:
    """Keeps the property of one image, and tells it as the catalog does."""

    def __init__(self, entry: ImageEntry) -> None:
        self.entry = entry
        self.given: list[str] = []
        self.error: errors.BasefsError | None = None

    async def publish(self, image_id: str, text: str) -> None:
        assert image_id == self.entry.image_id
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        self.given.append(text)
        self.tell(text)

    def tell(self, text: str | None) -> None:
        self.entry.record = dataclasses.replace(self.entry.record, boot_trace=text)


@pytest.fixture
def glance() -> Glance:
    return Glance(make_entry(SIZE))


def boot(entry: ImageEntry, *units: range, by_guest: bool = True) -> BootTrace:
    recording = TraceRecording()
    for at, some in enumerate(units or (range(100, 200),)):
        recording.note(some, at * 100)
    return recording.trace(traced_image(entry), by_guest=by_guest)


def sharing_over(glance: Glance, nursery: trio.Nursery, jitter: float = 0.5) -> TraceSharing:
    return TraceSharing(glance.publish, nursery, lambda: jitter)


async def passed(seconds: float = SPREAD_S) -> None:
    await trio.sleep(seconds)
    await trio.testing.wait_all_tasks_blocked()


async def test_a_guests_boot_is_given_and_another_node_has_it(
    glance: Glance, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    trace = boot(glance.entry)
    sharing_over(glance, nursery).offer(glance.entry, trace)
    await trio.testing.wait_all_tasks_blocked()
    assert not glance.given, "not all nodes at once"
    await passed()
    assert len(glance.given) == 1
    assert sharing_over(glance, nursery).shared(glance.entry, traced_image(glance.entry)) == trace


async def test_of_many_nodes_that_boot_at_once_one_gives_it(
    glance: Glance, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    for node in range(50):
        sharing_over(glance, nursery, jitter=node / 50).offer(glance.entry, boot(glance.entry))
    await passed()
    assert len(glance.given) == 1


async def test_what_is_much_the_same_or_no_guests_is_not_given(
    glance: Glance, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    sharing = sharing_over(glance, nursery)
    sharing.offer(glance.entry, boot(glance.entry, by_guest=False))
    await passed()
    glance.tell(property_of(boot(glance.entry)))
    sharing.offer(glance.entry, boot(glance.entry, range(103, 203)))
    await passed()
    assert not glance.given
    sharing.offer(glance.entry, boot(glance.entry, range(103, 303)))
    await passed()
    assert len(glance.given) == 1


async def test_an_image_is_written_to_once_an_hour(
    glance: Glance, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    sharing = sharing_over(glance, nursery)
    for at in range(20):
        sharing.offer(glance.entry, boot(glance.entry, range(100 * at, 100 * at + 100)))
        await passed(AGAIN_S / 10)
    assert len(glance.given) == 2


@pytest.mark.parametrize("text", ["", "1:", "x" * 5000, "1:eNoDAAAAAAE="])
async def test_what_is_no_trace_is_passed_over_in_silence_and_replaced(
    glance: Glance, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, text: str
) -> None:
    glance.tell(text)
    sharing = sharing_over(glance, nursery)
    assert sharing.shared(glance.entry, traced_image(glance.entry)) is None
    sharing.offer(glance.entry, boot(glance.entry))
    await passed()
    assert len(glance.given) == 1


async def test_who_may_not_is_told_once_and_who_cannot_now_not_at_all(
    glance: Glance,
    autojump_clock: trio.testing.MockClock,
    nursery: trio.Nursery,
    expected_warnings: ExpectedWarnings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected_warnings("its boot trace is not given to other nodes: 403")
    sharing = sharing_over(glance, nursery)
    for error in (
        errors.SourceUnavailableError("503"),
        errors.ImageNotFoundError("404"),
        errors.SourceForbiddenError("403"),
        errors.SourceForbiddenError("403"),
    ):
        glance.error = error
        entry = glance.entry = make_entry(SIZE)
        entry.number = len(caplog.records) + id(error)
        sharing.offer(entry, boot(entry))
        await passed()
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


async def test_the_store_takes_the_shared_one_only_where_it_has_none_and_merges_the_next_boot_with_it(
    glance: Glance, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    entry = glance.entry
    store = TraceStore(tmp_path, BlockingCalls("disk", threads_max=1), sharing_over(glance, nursery))
    assert not store.may_have(entry)
    theirs = boot(entry, range(100, 200))
    glance.tell(property_of(theirs))
    assert store.may_have(entry)
    assert await store.read(entry) == theirs
    await store.add(entry, boot(entry, range(100, 150)))
    own = await store.read(entry)
    assert own is not None
    assert (own.boots, set(own.units())) == (2, set(range(100, 200)))
    glance.tell(property_of(boot(entry, range(500, 600))))
    assert await store.read(entry) == own
    unshared = TraceStore(tmp_path / "other", BlockingCalls("disk", threads_max=1))
    assert not unshared.may_have(entry)
    assert await unshared.read(entry) is None

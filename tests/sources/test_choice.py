"""Where an image is read from, and what happens when that fails: all in memory, on a clock that stands."""

import logging
import math
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from basefs import errors
from basefs.sources import known_locations, store_reads, ways
from basefs.sources.base import Digest
from basefs.sources.ceph_cluster import ConnectionLostError
from basefs.sources.choice import SourceChoice
from basefs.sources.starts import START_BYTES
from tests.cache.memory_source import MemorySource
from tests.contract.test_image_source import Taken
from tests.fakes.memory_store import MemoryStore

DATA = os.urandom(1_000_000)
SIZE = len(DATA)
PIECE = 64 * 1024
IMAGE = "11111111-2222-3333-4444-555555555555"


@dataclass
class World:
    """Glance, two stores, and what Glance tells of locations."""

    glance: MemorySource = field(default_factory=lambda: MemorySource({IMAGE: DATA}))
    rbd: MemoryStore = field(default_factory=MemoryStore)
    s3: MemoryStore = field(default_factory=lambda: MemoryStore(name="s3", host="s3.example"))
    locations: list[str] = field(default_factory=list)
    asked: int = 0
    answer: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
    kept: bytes | None = None
    blamed: set[str] = field(default_factory=set)
    kept_locations: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What outlives a server."""

    def put(self, *stores: MemoryStore, data: bytes = DATA) -> None:
        self.locations += [store.put(IMAGE, data) for store in stores]

    async def ask(self, _image_id: str) -> list[str]:
        self.asked += 1
        await self.answer()
        return list(self.locations)

    async def kept_start(self, _image_id: str, length: int) -> bytes | None:
        await trio.lowlevel.checkpoint()
        return None if self.kept is None else self.kept[:length]

    def choice(self, nursery: trio.Nursery, *, order=("rbd", "s3"), stores=None) -> SourceChoice:
        return SourceChoice(
            self.glance,
            [self.rbd, self.s3] if stores is None else stores,
            self.ask,
            order=order,
            nursery=nursery,
            kept_start=self.kept_start,
            is_blamed=self.blamed.__contains__,
            jitter=lambda: 1.0,
            kept_locations=lambda image_id: self.kept_locations.get(image_id, ()),
            keep_locations=self.kept_locations.__setitem__,
        )


@pytest.fixture
def world():
    return World()


@pytest.fixture
def choice(world, nursery, mock_clock):
    return world.choice(nursery)


async def fetch(choice, offset=0, length=SIZE, *, size=SIZE, data=DATA):
    taken = Taken()
    await choice.fetch_range(IMAGE, size=size, offset=offset, length=length, piece_bytes=PIECE, deliver=taken)
    assert taken.joined(offset) == data[offset : offset + length]
    assert {len(piece) for _, piece in taken.pieces[:-1]} <= {PIECE}
    return taken


async def until(condition):
    """Return when it holds; the clock stands, threads and tasks go on."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await trio.lowlevel.checkpoint()


def states(choice):
    return {one["source"]: one["state"] for one in choice.report(IMAGE)["sources"]}


async def test_an_image_is_read_from_the_first_source_of_the_order(world, choice):
    world.put(world.s3, world.rbd)
    await fetch(choice)
    assert (world.glance.requests, world.s3.requests) == (0, 0)
    assert choice.report(IMAGE)["read_from"] == "rbd"
    assert states(choice) == {"rbd": "read", "s3": "ready"}
    assert choice.received_bytes == world.rbd.received_bytes == SIZE + START_BYTES


async def test_the_operators_order_counts(world, nursery, mock_clock):
    world.put(world.rbd, world.s3)
    await fetch(world.choice(nursery, order=("s3", "rbd", "glance")))
    assert (world.glance.requests, world.rbd.requests) == (0, 0)
    await fetch(world.choice(nursery, order=("glance", "rbd")))
    assert (world.glance.requests, world.rbd.requests) == (1, 0)


async def test_without_a_store_nothing_is_asked_but_glance_as_ever(world, nursery, mock_clock):
    world.put(world.rbd)
    choice = world.choice(nursery, stores=[])
    await choice.probe(IMAGE, size=SIZE, header_bytes=1000)
    await fetch(choice, 100, 200)
    assert (world.asked, world.glance.requests, world.rbd.opens) == (0, 2, 0)
    assert choice.good_at(IMAGE) == math.inf


async def test_locations_are_asked_for_once_and_none_is_remembered_for_a_while(world, choice, mock_clock):
    for _ in range(3):
        await fetch(choice, 0, 10)
    assert (world.asked, world.glance.requests) == (1, 3)
    mock_clock.jump(known_locations.NONE_AGAIN_S)
    world.put(world.rbd)
    await fetch(choice, 0, 10)
    assert (world.asked, world.glance.requests) == (2, 3)
    mock_clock.jump(1e6)
    await fetch(choice, 0, 10)
    assert world.asked == 2


async def test_many_readers_ask_for_locations_once_and_open_the_object_once(world, choice):
    world.put(world.rbd)
    async with trio.open_nursery() as readers:
        for n in range(20):
            readers.start_soon(fetch, choice, n * 1000, 1000)
    assert (world.asked, world.rbd.opens, world.rbd.requests) == (1, 1, 21)


async def test_a_question_that_fails_is_not_made_for_each_read(world, choice, mock_clock):
    async def refuse():
        raise errors.SourceUnavailableError("Glance is busy")

    world.put(world.rbd)
    world.answer = refuse
    for _ in range(3):
        await fetch(choice, 0, 10)
    assert (world.asked, world.glance.requests) == (1, 3)
    world.answer = trio.lowlevel.checkpoint
    mock_clock.jump(known_locations.FAILED_AGAIN_S)
    await fetch(choice, 0, 10)
    assert (world.asked, world.glance.requests) == (2, 3)


async def test_a_question_that_hangs_holds_a_reader_up_for_a_while_only(world, choice, mock_clock, nursery):
    world.put(world.rbd)
    world.answer = trio.sleep_forever
    async with trio.open_nursery() as readers:
        readers.start_soon(fetch, choice, 0, 10)
        await until(lambda: world.asked)
        mock_clock.jump(known_locations.ANSWER_LIMIT_S)
    assert world.glance.requests == 1


async def test_what_a_source_delivered_counts_and_the_rest_comes_from_the_next(world, choice, expected_warnings):
    expected_warnings("rbd at cluster fails: nobody answers")
    world.put(world.rbd, world.s3)
    await fetch(choice, 0, 10)
    world.rbd.fault = lambda: errors.SourceUnavailableError("nobody answers", may_be_away=True)
    world.rbd.pieces_before_fault = 4
    await fetch(choice)
    assert world.s3.calls[-1] == (world.locations[1], 4 * PIECE, SIZE - 4 * PIECE)
    assert world.glance.requests == 0
    assert states(choice) == {"rbd": "resting", "s3": "read"}
    assert choice.report(IMAGE)["read_from"] == "s3"


async def test_glance_is_the_last_resort_and_its_error_the_readers(world, choice, expected_warnings):
    expected_warnings("rbd at cluster fails")
    world.put(world.rbd)
    world.rbd.fault = lambda: errors.SourceUnavailableError("nobody answers", may_be_away=True)
    world.glance.faults = [errors.SourceForbiddenError("no")]
    with pytest.raises(errors.SourceForbiddenError):
        await fetch(choice)
    await fetch(choice)
    world.glance.images.clear()
    with pytest.raises(errors.ImageNotFoundError):
        await fetch(choice)


async def test_glance_failing_is_felt_by_nobody_who_has_a_store(world, choice):
    world.put(world.rbd)
    world.glance.images.clear()
    await fetch(choice)
    assert choice.good_at(IMAGE) == -math.inf
    assert world.glance.requests == 0


async def test_a_store_that_fails_is_tried_by_a_task_of_its_own_and_read_from_again(
    world, choice, mock_clock, expected_warnings, caplog
):
    caplog.set_level(logging.INFO)
    expected_warnings("rbd at cluster fails")
    world.put(world.rbd)
    world.rbd.fault = lambda: errors.SourceUnavailableError("nobody answers", may_be_away=True)
    await fetch(choice, 0, 10)
    opens = world.rbd.opens
    for _ in range(5):
        await fetch(choice, 0, 10)
    assert world.rbd.opens == opens, "it rests"
    assert choice.good_at(IMAGE) == trio.current_time() + 1.0
    for pause in (1.0, 2.0, 4.0):
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(pause)
        opens += 1
        await until(lambda n=opens: world.rbd.opens == n)
        await trio.testing.wait_all_tasks_blocked()
        assert states(choice) == {"rbd": "resting"}
        assert choice.stores_report()[0]["state"] == "resting"
    glance_requests = world.glance.requests
    world.rbd.fault = None
    mock_clock.jump(8.0)
    await until(lambda: states(choice) == {"rbd": "ready"})
    await fetch(choice)
    assert world.glance.requests == glance_requests
    assert "rbd at cluster answers again" in caplog.text
    assert choice.stores_report()[0] == {"source": "rbd", "endpoint": "cluster", "state": "answers", "error": None}


async def test_an_image_that_rests_at_a_store_that_answers_is_tried_when_it_is_wanted(
    world, choice, mock_clock, expected_warnings
):
    expected_warnings("is not read from rbd at cluster: no key")
    world.put(world.rbd)
    world.rbd.fault = lambda: errors.SourceForbiddenError("no key")
    await fetch(choice, 0, 10)
    world.rbd.fault = None
    mock_clock.jump(ways.WRONG_REST_S)
    await trio.testing.wait_all_tasks_blocked()
    assert states(choice) == {"rbd": "resting"}
    await fetch(choice, 0, 10)
    await until(lambda: states(choice) == {"rbd": "ready"})
    assert world.glance.requests == 2


async def test_what_was_open_and_ended_with_its_connection_is_opened_anew_soon(
    world, choice, mock_clock, expected_warnings
):
    expected_warnings("is not read from rbd at cluster: not this client")
    world.put(world.rbd)
    world.rbd.fault = lambda: ConnectionLostError("not this client")
    await fetch(choice, 0, 10)
    world.rbd.fault = None
    mock_clock.jump(1.0)
    await fetch(choice, 0, 10)
    await until(lambda: states(choice) == {"rbd": "ready"})


async def test_an_endpoint_that_fails_one_image_rests_for_all(world, choice, expected_warnings):
    expected_warnings("rbd at cluster fails")
    world.put(world.rbd)
    other = "22222222-2222-3333-4444-555555555555"
    world.locations.append(world.rbd.put(other, DATA))
    world.glance.images[other] = DATA
    await choice.probe(other, size=SIZE, header_bytes=START_BYTES)
    world.rbd.fault = lambda: errors.SourceUnavailableError("nobody answers", may_be_away=True)
    await fetch(choice)
    requests = world.rbd.requests
    taken = Taken()
    await choice.fetch_range(other, size=SIZE, offset=0, length=SIZE, piece_bytes=PIECE, deliver=taken)
    assert taken.joined(0) == DATA
    assert world.rbd.requests == requests


@pytest.mark.parametrize(
    ("fault", "warning"),
    [
        (errors.SourceForbiddenError("no key"), "is not read from rbd at cluster: no key"),
        (errors.SourceCorruptError("too short"), "is not read from rbd at cluster: too short"),
        (errors.RangeNotHonouredError("no ranges"), "is not read from rbd at cluster: no ranges"),
        (errors.SourceUnavailableError("busy", retry_after_s=20.0), None),
    ],
)
async def test_what_speaks_against_one_image_is_no_word_on_its_endpoint(
    world, choice, mock_clock, expected_warnings, fault, warning
):
    if warning:
        expected_warnings(warning)
    world.put(world.rbd)
    world.rbd.fault = lambda: fault
    await fetch(choice)
    rest_s = choice.good_at(IMAGE) - trio.current_time()
    assert rest_s == (ways.WRONG_REST_S if warning else 20.0)
    await fetch(choice)
    assert (world.rbd.opens, world.glance.requests) == (1, 2)


async def test_a_slow_store_is_left_for_the_next_source_in_the_same_read(world, choice, mock_clock, expected_warnings):
    expected_warnings("rbd at cluster fails: nothing came for 5 s")
    world.put(world.rbd)
    await fetch(choice, 0, 10)
    world.rbd.hold = trio.Event()
    async with trio.open_nursery() as readers:
        readers.start_soon(fetch, choice)
        await until(lambda: world.rbd.requests == 3)
        mock_clock.jump(store_reads.FIRST_PIECE_S)
    assert world.glance.requests == 1


async def test_what_is_late_at_one_store_is_asked_of_the_next_one(world, choice, nursery):
    world.put(world.rbd, world.s3)
    await fetch(choice, 0, 10)
    world.rbd.hold = trio.Event()
    async with trio.open_nursery() as readers:
        readers.start_soon(fetch, choice, 0, 200_000)
        await until(lambda: len(world.rbd.calls) == 3)
        await fetch(choice, 100_000, 100_000)
        assert world.s3.calls[-1] == (world.locations[1], 100_000, 100_000)
        readers.start_soon(fetch, choice, 200_000, 100_000)  # other bytes are late nowhere
        await until(lambda: len(world.rbd.calls) == 4)
        world.rbd.hold.set()
    assert world.glance.requests == 0
    asked = len(world.s3.calls)
    await fetch(choice)
    assert len(world.s3.calls) == asked


async def test_what_is_late_at_the_only_store_is_asked_of_it_again_before_glance(world, choice):
    world.put(world.rbd)
    await fetch(choice, 0, 10)
    world.rbd.hold = trio.Event()
    async with trio.open_nursery() as readers:
        for number in range(2):
            readers.start_soon(fetch, choice, 0, 200_000)
            await until(lambda number=number: len(world.rbd.calls) == 3 + number)
        world.rbd.hold.set()
    assert world.glance.requests == 0


async def test_a_store_that_hangs_when_it_is_opened_is_left_too(world, choice, mock_clock, expected_warnings):
    expected_warnings("rbd at cluster fails: nothing came for 5 s")
    world.put(world.rbd)
    world.rbd.hold = trio.Event()
    async with trio.open_nursery() as readers:
        for _ in range(5):
            readers.start_soon(fetch, choice)
        await until(lambda: world.rbd.opens == 1)
        mock_clock.jump(store_reads.FIRST_PIECE_S)
    assert world.glance.requests == 5


async def test_a_store_that_stops_in_the_middle_is_left_after_a_silence(world, choice, mock_clock, expected_warnings):
    expected_warnings("rbd at cluster fails: nothing came for 8 s")
    world.put(world.rbd)
    await fetch(choice, 0, 10)
    world.rbd.hold, world.rbd.hold_after_pieces = trio.Event(), 3
    received = world.rbd.received_bytes
    async with trio.open_nursery() as readers:
        readers.start_soon(fetch, choice)
        await until(lambda: world.rbd.received_bytes == received + 3 * PIECE)
        await trio.testing.wait_all_tasks_blocked(0.01)
        mock_clock.jump(store_reads.SILENCE_S - 0.1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert world.glance.requests == 0
        mock_clock.jump(0.1)
    assert world.glance.calls[-1] == ("range", 3 * PIECE, SIZE - 3 * PIECE)


async def test_a_receiver_that_has_enough_ends_it_everywhere(world, choice):
    world.put(world.rbd)
    taken = Taken(pieces_max=2)
    await choice.fetch_range(IMAGE, size=SIZE, offset=0, length=SIZE, piece_bytes=PIECE, deliver=taken)
    assert taken.joined(0) == DATA[: 2 * PIECE]
    assert world.glance.requests == 0
    assert states(choice) == {"rbd": "read"}


async def test_an_object_that_is_gone_has_the_locations_asked_for_again(world, choice, mock_clock, expected_warnings):
    expected_warnings("is not read from rbd at cluster: rbd has another object there, or none")
    world.put(world.rbd)
    await fetch(choice, 0, 10)
    world.rbd.objects.clear()
    world.locations.clear()
    world.put(world.s3)
    await fetch(choice, 0, 10)
    assert (world.asked, world.glance.requests) == (1, 1)
    mock_clock.jump(known_locations.REFRESH_PAUSE_S)
    await fetch(choice, 0, 10)
    await until(lambda: world.asked == 2)
    await trio.testing.wait_all_tasks_blocked()
    await fetch(choice, 0, 10)
    assert choice.report(IMAGE)["read_from"] == "s3"
    assert world.rbd.opened == 0, "what is no location any more is closed"


async def test_glance_that_hangs_holds_up_nobody_whose_locations_are_asked_for_again(
    world, choice, mock_clock, expected_warnings
):
    expected_warnings("is not read from rbd at cluster")
    world.put(world.rbd, world.s3)
    await fetch(choice, 0, 10)
    world.answer = trio.sleep_forever
    del world.rbd.objects[world.locations[0]]
    await fetch(choice)
    mock_clock.jump(known_locations.REFRESH_PAUSE_S)
    await fetch(choice)
    assert world.glance.requests == 0


# --- a server after another ------------------------------------------------------------------------------


async def unavailable():
    raise errors.SourceUnavailableError("Glance is away", may_be_away=True)


async def test_a_server_that_follows_reads_on_while_glance_is_away(world, choice, nursery, mock_clock):
    world.put(world.rbd)
    await fetch(choice)
    world.answer = unavailable
    world.glance.images.clear()
    follower = world.choice(nursery)
    assert follower.good_at(IMAGE) == -math.inf
    await fetch(follower)
    await until(lambda: world.asked == 2)
    mock_clock.jump(known_locations.FAILED_AGAIN_S)
    await fetch(follower)
    await until(lambda: world.asked == 3)
    assert follower.report(IMAGE)["read_from"] == "rbd"


async def test_a_server_that_follows_waits_for_glances_word_no_more_than_the_one_before(world, choice, nursery):
    world.put(world.rbd)
    await fetch(choice)
    world.answer = trio.sleep_forever
    await fetch(world.choice(nursery))
    assert world.glance.requests == 0


async def test_what_glance_says_anew_takes_the_place_of_what_was_kept(world, choice, nursery):
    world.put(world.rbd)
    await fetch(choice)
    world.locations.clear()
    world.put(world.s3)
    follower = world.choice(nursery)
    await fetch(follower)
    await until(lambda: world.asked == 2)
    await trio.testing.wait_all_tasks_blocked()
    await fetch(follower)
    assert follower.report(IMAGE)["read_from"] == "s3"
    assert world.kept_locations == {IMAGE: tuple(world.locations)}


@pytest.mark.parametrize("forgets", ["none told", "not ours any more"])
async def test_locations_that_are_none_any_more_are_not_kept(world, choice, nursery, mock_clock, forgets):
    world.put(world.rbd)
    await fetch(choice)

    async def not_found():
        raise errors.ImageNotFoundError("no such image")

    world.locations.clear()
    world.answer = not_found if forgets == "not ours any more" else trio.lowlevel.checkpoint
    follower = world.choice(nursery)
    await fetch(follower)
    await until(lambda: world.asked == 2)
    await trio.testing.wait_all_tasks_blocked()
    await fetch(follower)
    assert world.kept_locations == {IMAGE: ()}
    assert world.choice(nursery).good_at(IMAGE) == math.inf


async def test_what_was_kept_and_is_not_allowed_any_more_is_not_read(world, choice, nursery):
    world.put(world.rbd)
    await fetch(choice)
    opens, world.answer = world.rbd.opens, unavailable
    for follower in (world.choice(nursery, stores=[world.s3]), world.choice(nursery, order=("s3",))):
        assert follower.good_at(IMAGE) == math.inf
        await fetch(follower)
        assert follower.report(IMAGE)["read_from"] == "glance"
    assert world.rbd.opens == opens
    world.kept_locations[IMAGE] = ("rbd://cluster/22222222-2222-3333-4444-555555555555",)
    assert world.choice(nursery).good_at(IMAGE) == math.inf


async def test_what_may_be_read_in_place_is_kept_too_and_what_leads_nowhere_is_not(world, choice):
    world.put(world.rbd)
    world.locations += [f"file:///images/{IMAGE}", f"rbd://elsewhere/{IMAGE}", "ftp://anywhere/x"]
    await fetch(choice)
    assert world.kept_locations == {IMAGE: (f"rbd://cluster/{IMAGE}", f"file:///images/{IMAGE}")}


async def test_no_location_with_what_may_be_a_key_is_kept(world, nursery, mock_clock):
    store = MemoryStore(name="http", host="web.example")
    store.refusal = lambda _image_id, _location: None
    location = f"http://web.example/{IMAGE}?signature=SECRET"
    store.objects[location] = DATA
    world.locations = [location]
    choice = world.choice(nursery, order=("http",), stores=[store])
    await fetch(choice)
    assert choice.report(IMAGE)["read_from"] == "http"
    assert world.kept_locations == {IMAGE: ()}


# --- trust ----------------------------------------------------------------------------------------------


async def test_a_probe_reads_the_header_once_and_says_from_where(world, choice):
    world.put(world.rbd)
    probe = await choice.probe(IMAGE, size=SIZE, header_bytes=1 << 19)
    assert (probe.kind, probe.header) == ("ranged", DATA[: 1 << 19])
    assert probe.reason == "rbd at cluster answered a Range with exactly its bytes"
    await fetch(choice)
    assert [call[1:] for call in world.rbd.calls] == [(0, 1 << 19), (0, SIZE)]
    assert world.glance.requests == 0


async def test_a_probe_goes_to_glance_where_the_store_fails(world, choice, expected_warnings):
    expected_warnings("rbd at cluster fails")
    world.put(world.rbd)
    world.rbd.fault = lambda: errors.SourceUnavailableError("nobody answers", may_be_away=True)
    world.rbd.pieces_before_fault = 0
    probe = await choice.probe(IMAGE, size=SIZE, header_bytes=1000)
    assert (probe.reason, probe.header) == ("memory", DATA[:1000])


@pytest.mark.parametrize("knows", ["cache", "glance", "rbd"])
async def test_a_second_source_that_begins_with_other_bytes_is_not_read(world, choice, expected_warnings, knows):
    expected_warnings("is not read from s3 at s3.example: it begins with other bytes than the image")
    other = DATA[: START_BYTES - 1] + bytes([DATA[START_BYTES - 1] ^ 1]) + DATA[START_BYTES:]
    if knows == "cache":
        world.kept = DATA
    elif knows == "glance":
        await choice.probe(IMAGE, size=SIZE, header_bytes=START_BYTES)
        choice._locations.refresh(IMAGE)
        choice._locations._known.clear()
    else:
        world.put(world.rbd)
        await fetch(choice)
        expected_warnings("rbd at cluster fails")
        world.rbd.fault = lambda: errors.SourceUnavailableError("nobody answers", may_be_away=True)
        choice._locations._known.clear()
        world.kept_locations.clear()
    world.put(world.s3, data=other)
    await fetch(choice)
    assert world.s3.calls == [(world.locations[-1], 0, START_BYTES)]
    assert world.glance.calls[-1] == ("range", 0, SIZE)


async def test_a_store_whose_library_is_not_installed_says_so(world, choice):
    world.s3.missing = "botocore is not installed"
    assert choice.stores_report() == [
        {"source": "rbd", "endpoint": "", "state": "unused", "error": None},
        {"source": "s3", "endpoint": "", "state": "missing", "error": "botocore is not installed"},
    ]


async def test_an_object_of_another_size_is_not_read(world, choice, expected_warnings):
    expected_warnings("is not read from rbd at cluster: rbd has 999999 bytes, the image's metadata say 1000000")
    world.put(world.rbd, data=DATA[:-1])
    await fetch(choice)
    assert world.rbd.requests == 0


async def test_locations_that_a_store_refuses_are_not_tried_and_told_without_their_keys(
    world, nursery, mock_clock, caplog
):
    caplog.set_level(logging.INFO)
    choice = world.choice(nursery, order=("volume", "rbd", "file", "http", "glance"))
    world.locations = [
        "cinder://store/11111111-1111-1111-1111-111111111111",
        f"rbd://KEY:SECRET@cluster/{IMAGE}",
        "rbd://cluster/22222222-2222-3333-4444-555555555555",
        "file:///etc/shadow",
        "http://169.254.169.254/latest/meta-data?token=SECRET",
        f"s3://KEY:SECRET@s3.example/{IMAGE}",
        "ftp://KEY:SECRET@anywhere/x",
        "",
        "\0",
    ]
    await fetch(choice)
    assert (world.rbd.opens, world.s3.opens, world.glance.requests) == (0, 0, 1)
    report = choice.report(IMAGE)
    assert [(one["source"], one["reason"]) for one in report["sources"]] == [
        ("volume", "read by volume-linking, see `link`"),
        ("rbd", "it holds a password"),
        ("rbd", "by its name it is another image's"),
        ("file", "used in place, see `file`"),
        ("http", "it is not configured"),
        ("s3", "source_order leaves it out"),
    ]
    assert "SECRET" not in caplog.text + repr(report)
    assert "KEY" not in caplog.text + repr(report)


async def test_a_blamed_image_is_read_through_glance_only(world, choice, expected_warnings):
    expected_warnings(f"image {IMAGE}: its bytes had another hash .* come from rbd at cluster: it is read through")
    world.put(world.rbd, world.s3)
    await fetch(choice)
    assert choice.blame(IMAGE)
    world.blamed.add(IMAGE)
    await fetch(choice)
    assert world.glance.requests == 1
    assert choice.good_at(IMAGE) == math.inf
    assert choice.report(IMAGE)["sources"][-1]["state"] == "only"
    await until(lambda: world.rbd.opened == 0)


async def test_only_a_store_that_may_have_had_to_do_with_it_is_blamed(world, choice, nursery, expected_warnings):
    assert not world.choice(nursery, stores=[]).blame(IMAGE)
    expected_warnings("some may have come from a store, through a server before this one")
    assert choice.blame(IMAGE), "who knows what an earlier server did"
    await fetch(choice)
    assert not choice.blame(IMAGE), "it has no location in a store"


async def test_a_stream_is_glances(world, choice):
    world.put(world.rbd)
    taken = Taken()
    await choice.fetch_stream(IMAGE, size=SIZE, piece_bytes=PIECE, digest=None, deliver=taken)
    assert taken.joined(0) == DATA
    assert isinstance(choice.glance, MemorySource)
    assert world.rbd.requests == 0
    digest = Digest(algorithm="md5", value="0" * 32)
    with pytest.raises(errors.SourceHashError):
        await choice.fetch_stream(IMAGE, size=SIZE, piece_bytes=PIECE, digest=digest, deliver=Taken())


async def test_objects_not_read_from_for_long_are_closed(world, choice, monkeypatch):
    monkeypatch.setattr("basefs.sources.choice.OPEN_OBJECTS_MAX", 3)
    images = [f"{n:08}-2222-3333-4444-555555555555" for n in range(6)]
    world.locations = [world.rbd.put(image, DATA) for image in images]
    for image in images:
        await choice.probe(image, size=SIZE, header_bytes=START_BYTES)
    await until(lambda: world.rbd.opened == 3)
    await choice.probe(images[0], size=SIZE, header_bytes=START_BYTES)
    assert world.rbd.opens == 7
    await until(lambda: world.rbd.opened == 3)
    await choice.close()
    assert world.rbd.is_closed


@pytest.mark.parametrize("where", ["open", "read"])
async def test_a_bug_in_a_store_costs_no_read(world, choice, expected_warnings, where):
    expected_warnings("bug in the work for 'open'" if where == "open" else "bug in rbd at cluster, for image")
    expected_warnings("rbd at cluster fails: ")
    world.put(world.rbd)
    if where == "read":
        await fetch(choice, 0, 10)
    world.rbd.fault = lambda: KeyError("a library's")
    await fetch(choice)
    assert world.glance.requests == 1


async def test_a_cancelled_read_says_nothing_of_its_source(world, choice, nursery):
    world.put(world.rbd)
    await fetch(choice, 0, 10)
    world.rbd.hold = trio.Event()
    with trio.CancelScope() as scope:
        nursery.start_soon(cancel_when, scope, lambda: world.rbd.requests == 3)
        await fetch(choice)
    assert scope.cancelled_caught
    world.rbd.hold = None
    await fetch(choice)
    assert world.glance.requests == 0


async def cancel_when(scope, condition):
    await until(condition)
    scope.cancel()


FAULTS = st.sampled_from([None, "away", "gone", "forbidden", "corrupt", "ranges"])
ERRORS = {
    "away": lambda: errors.SourceUnavailableError("away", may_be_away=True),
    "gone": lambda: errors.StoreGoneError("gone"),
    "forbidden": lambda: errors.SourceForbiddenError("no"),
    "corrupt": lambda: errors.SourceCorruptError("wrong"),
    "ranges": lambda: errors.RangeNotHonouredError("no ranges"),
}


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            FAULTS, FAULTS, st.integers(0, 4), st.integers(0, SIZE - 1), st.integers(1, SIZE), st.floats(0, 2000)
        ),
        max_size=8,
    )
)
def test_whatever_the_stores_do_every_byte_comes_right_while_glance_answers(steps):
    logging.disable(logging.WARNING)

    async def live():
        world, clock = World(), trio.lowlevel.current_clock()
        world.put(world.rbd, world.s3)
        async with trio.open_nursery() as nursery:
            choice = world.choice(nursery)
            for rbd_fault, s3_fault, pieces, offset, length, pause in steps:
                for store, fault in ((world.rbd, rbd_fault), (world.s3, s3_fault)):
                    store.fault = ERRORS[fault] if fault else None
                    store.pieces_before_fault = pieces or None
                await fetch(choice, offset, min(length, SIZE - offset))
                clock.jump(pause)
            nursery.cancel_scope.cancel()

    try:
        trio.run(live, clock=trio.testing.MockClock())
    finally:
        logging.disable(logging.NOTSET)

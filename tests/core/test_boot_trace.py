"""Boot traces: what is recorded comes back, merges are bounded, files are right or told why not, plans are whole."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.boot_trace import (
    RANGES_MAX,
    UNIT_BYTES,
    UNITS_MAX,
    UNREAD_MAX,
    BootTrace,
    TracedImage,
    TraceRange,
    TraceRecording,
    merged,
)
from basefs.core.link_estimate import GAP_BYTES_MAX
from basefs.core.trace_file import FILE_BYTES_MAX, parse_trace, trace_bytes, trace_document, trace_for
from basefs.core.trace_plan import REQUEST_BYTES_MAX, TracePlan, missing_around, missing_runs, requests_for
from tools.bench.replay import distinct_bytes, load_trace

IMAGE = TracedImage(image_id="11111111-2222", size=300 * UNIT_BYTES + 5, os_hash_algo="sha512", os_hash_value="00ff")
touches = st.lists(st.tuples(st.integers(0, IMAGE.units - 1), st.integers(0, 200)), max_size=80)


def recorded(units: list[tuple[int, int]], *, image: TracedImage = IMAGE, by_guest: bool = True) -> BootTrace:
    recording, at_ms = TraceRecording(), 0
    for unit, later_ms in units:
        at_ms += later_ms
        recording.note([unit], at_ms)
    return recording.trace(image, by_guest=by_guest)


def boot_units() -> list[int]:
    """The units of the recorded boot, in order."""
    seen: dict[int, None] = {}
    for offset, length in load_trace():
        seen |= dict.fromkeys(range(offset // UNIT_BYTES, (offset + length - 1) // UNIT_BYTES + 1))
    return list(seen)


@given(touches)
def test_a_trace_has_each_touched_unit_once_in_order(units: list[tuple[int, int]]) -> None:
    trace = recorded(units)
    assert list(trace.units()) == list(dict.fromkeys(unit for unit, _ in units))
    assert all(a.at_ms <= b.at_ms for a, b in itertools.pairwise(trace.ranges))


@given(touches)
def test_a_trace_comes_back_from_its_file(units: list[tuple[int, int]]) -> None:
    trace = recorded(units)
    assert parse_trace(trace_bytes(trace)) == trace


def test_a_trace_is_bounded_whatever_is_read() -> None:
    image = TracedImage(image_id="x" * 36, size=1 << 49, os_hash_algo="sha512", os_hash_value="f" * 128)
    far = image.units - 1
    scattered = recorded([(far - 2 * n, 40_000) for n in range(UNITS_MAX + 10)], image=image)
    assert len(scattered.ranges) == RANGES_MAX
    assert len(trace_bytes(scattered)) <= FILE_BYTES_MAX
    assert parse_trace(trace_bytes(scattered)).image == image
    in_order = recorded([(n, 0) for n in range(UNITS_MAX + 10)], image=image)
    assert list(in_order.units()) == list(range(UNITS_MAX))


def test_the_bytes_of_a_trace_are_counted_to_the_end_of_the_image() -> None:
    assert recorded([(0, 0), (300, 0)]).traced_bytes == UNIT_BYTES + 5
    assert recorded([(0, 0), (299, 0)]).traced_bytes == 2 * UNIT_BYTES


@pytest.mark.parametrize(
    ("mib", "others", "is_copy"),
    [(256, 0, True), (40, 0, True), (32, 0, False), (40, 5, True), (40, 20, False), (600, 0, True)],
)
def test_one_long_piece_and_little_else_is_a_copy(mib: int, others: int, is_copy: bool) -> None:
    image = TracedImage(image_id="large", size=1 << 30, os_hash_algo=None, os_hash_value=None)
    pieces = [TraceRange(64, mib * 16, 1), *(TraceRange(12_000 + 20 * n, 16, 2) for n in range(others))]
    assert BootTrace(image=image, boots=1, by_guest=True, ranges=tuple(pieces)).is_copy == is_copy


def test_most_of_a_small_image_is_a_copy_in_whatever_order() -> None:
    assert recorded([(n * 7 % 300, 0) for n in range(151)]).is_copy
    assert not recorded([(n * 7 % 300, 0) for n in range(150)]).is_copy


def test_the_recorded_boot_is_no_copy() -> None:
    image = TracedImage(image_id="debian", size=489 << 20, os_hash_algo=None, os_hash_value=None)
    assert not recorded([(unit, 0) for unit in boot_units()], image=image).is_copy


@given(touches, touches)
def test_a_merge_is_the_union_and_valid(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    both = merged(recorded(first), recorded(second))
    assert set(both.units()) == {unit for unit, _ in first} | {unit for unit, _ in second}
    assert both.boots == 2
    assert parse_trace(trace_bytes(both)) == both


@given(touches)
def test_the_same_boot_again_changes_nothing(units: list[tuple[int, int]]) -> None:
    trace = recorded(units)
    again = merged(trace, trace)
    assert again.ranges == trace.ranges


def test_a_unit_that_boots_in_a_row_did_not_read_is_dropped() -> None:
    trace = recorded([(7, 0), (9, 10)])
    for left in range(UNREAD_MAX - 1, 0, -1):
        trace = merged(trace, recorded([(9, 5)]))
        assert (7 in trace.units()) == (left > 0)
    assert list(merged(trace, recorded([(7, 0)])).units()) == [7, 9], "read again it stays"
    assert list(merged(trace, recorded([(9, 5)])).units()) == [9]


def test_guests_and_other_programs_are_not_mixed() -> None:
    guest, other = recorded([(1, 0)]), recorded([(2, 0)], by_guest=False)
    assert merged(guest, other) == guest
    assert merged(other, guest) == guest
    assert set(merged(other, recorded([(3, 0)], by_guest=False)).units()) == {2, 3}


def test_a_trace_of_other_bytes_counts_for_nothing() -> None:
    other = recorded([(1, 0)], image=TracedImage(image_id="2", size=IMAGE.size, os_hash_algo=None, os_hash_value=None))
    trace = recorded([(2, 0)])
    assert merged(other, trace) == trace
    assert trace_for(trace_bytes(trace), IMAGE) == trace
    with pytest.raises(ValueError, match="image_id: '2', the image has '11111111-2222'"):
        trace_for(trace_bytes(other), IMAGE)


GOOD = trace_document(recorded([(5, 0), (6, 0), (9, 100), (2, 7)]))
WRONG: list[tuple[str, Any, str]] = [
    ("format", "x", "format: not 'basefs boot trace'"),
    ("version", 2, "version: 2 is not 1"),
    ("version", True, "version: True is not 1"),
    ("image_id", "", "image_id: '' is no text of 1 to 255 characters"),
    ("image_id", "a\nb", "image_id: 'a\\nb' is no text of 1 to 255 characters"),
    ("size", 0, "size: 0 is no whole number from 1 to 1125899906842624"),
    ("size", 1.5, "size: 1.5 is no whole number from 1 to 1125899906842624"),
    ("os_hash_value", [], "os_hash_value: list is no text of 1 to 255 characters"),
    ("unit_bytes", 4096, "unit_bytes: 4096 is not 65536"),
    ("boots", 0, "boots: 0 is no whole number from 1 to 1000000"),
    ("by_guest", 1, "by_guest: not true or false"),
    ("more", 1, "'more': unknown member"),
    ("ranges", {}, "ranges: not an array"),
    ("ranges", [[0, 1, 0, 0]] * (RANGES_MAX + 1), f"ranges: {RANGES_MAX + 1}, a trace has at most {RANGES_MAX}"),
    ("ranges", [[0, 1, 0]], "ranges[0]: not an array of 4 numbers"),
    ("ranges", [[301, 1, 0, 0]], "ranges[0][0]: 301 is no whole number from 0 to 300"),
    ("ranges", [[300, 2, 0, 0]], "ranges[0][1]: 2 is no whole number from 1 to 1"),
    ("ranges", [[3, 2, 9, 0], [5, 1, 8, 0]], "ranges[1][2]: 8 is no whole number from 9 to 86400000"),
    ("ranges", [[3, 2, 0, 3]], "ranges[0][3]: 3 is no whole number from 0 to 2"),
    ("ranges", [[3, 2, 0, 0], [4, 1, 0, 0]], "ranges[1]: a unit of it was in a range before"),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG)
def test_a_file_that_is_wrong_is_refused_with_the_member(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_trace(json.dumps({**GOOD, name: value}).encode())
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "byte 0: not JSON"),
        (b'{"a": \xff}', "byte 6: not UTF-8"),
        ('{"ä": }'.encode(), "byte 7: not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b" " * (FILE_BYTES_MAX + 1), "it has 65537 bytes"),
    ],
)
def test_bytes_that_are_no_trace_are_refused_with_the_place(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        parse_trace(data)


@given(
    st.lists(st.integers(0, IMAGE.units - 1), max_size=80),
    st.sampled_from([16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20]),
    st.integers(0, GAP_BYTES_MAX),
)
def test_a_plan_brings_every_unit_once_and_little_else(units: list[int], chunk_bytes: int, gap_bytes: int) -> None:
    requests = requests_for(units, size=IMAGE.size, chunk_bytes=chunk_bytes, gap_bytes=gap_bytes)
    chunks = [chunk for request in requests for chunk in request]
    assert len(chunks) == len(set(chunks))
    wanted = {
        chunk
        for unit in units
        for chunk in range(
            unit * UNIT_BYTES // chunk_bytes, -(-min((unit + 1) * UNIT_BYTES, IMAGE.size) // chunk_bytes)
        )
    }
    assert wanted <= set(chunks)
    assert set(chunks) <= set(range(-(-IMAGE.size // chunk_bytes)))
    for request in requests:
        assert {request[0], request[-1]} <= wanted, "a request begins and ends with what is wanted"
        assert len(request) <= max(1, REQUEST_BYTES_MAX // chunk_bytes)
        gaps = [chunk not in wanted for chunk in request]
        assert all(
            sum(gaps[at : at + gap_bytes // chunk_bytes + 1]) <= gap_bytes // chunk_bytes for at in range(len(gaps))
        )
    first = [min((at for at, unit in enumerate(units) if _touches(unit, request, chunk_bytes))) for request in requests]
    assert first == sorted(first), "the request of what comes first comes first"


def _touches(unit: int, request: range, chunk_bytes: int) -> bool:
    begin, end = unit * UNIT_BYTES, (unit + 1) * UNIT_BYTES
    return begin < request.stop * chunk_bytes and end > request.start * chunk_bytes


def test_the_recorded_boot_is_107_requests_and_less_than_a_tenth_more_bytes() -> None:
    units = boot_units()
    size, header = 3 << 30, range((1 << 20) // UNIT_BYTES)
    requests = requests_for(units, size=size, chunk_bytes=UNIT_BYTES, gap_bytes=GAP_BYTES_MAX)
    fetched = {chunk for request in requests for chunk in request} | set(header)
    assert len(requests) == 107
    assert len(fetched) * UNIT_BYTES <= 1.1 * distinct_bytes(load_trace(), UNIT_BYTES)


def test_twelve_requests_for_the_recorded_boot_would_be_five_times_its_bytes() -> None:
    """Whatever is coalesced: the eleven widest gaps stay, all others are fetched along."""
    units = sorted(boot_units())
    gaps = sorted(after - before - 1 for before, after in itertools.pairwise(units))
    assert (len(units) + sum(gaps[:-11])) / len(units) > 5


@given(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=60).map(bytearray), st.data())
def test_missing_runs_are_the_zeros_of_a_range(states: bytearray, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(states)))
    chunks = range(start, data.draw(st.integers(start, len(states))))
    missing = [index for index in chunks if not states[index]]
    runs = missing_runs(states, chunks)
    assert [index for run in runs for index in run] == missing
    for index in missing:
        assert missing_around(states, index, chunks) in runs
        assert index in missing_around(states, index, chunks)


def test_a_plan_gives_each_request_once_in_order() -> None:
    plan = TracePlan([range(3, 5), range(9, 12)])
    assert plan.around(10) == range(9, 12)
    assert plan.around(5) is None
    assert [plan.next(), plan.next(), plan.next()] == [range(3, 5), range(9, 12), None]
    assert plan.around(10) is None
    assert len(plan) == 0

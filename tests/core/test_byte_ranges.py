"""Byte-range arithmetic and the headers that carry ranges."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.byte_ranges import chunk_span, longest_zero_run, parse_content_range, range_header, runs


@given(offset=st.integers(0, 2**62), length=st.integers(1, 2**40), chunk_exp=st.integers(12, 24))
def test_a_span_covers_the_bytes_and_no_chunk_more(offset: int, length: int, chunk_exp: int) -> None:
    chunk_bytes = 1 << chunk_exp
    span = chunk_span(offset, length, chunk_bytes)
    assert span.start * chunk_bytes <= offset < (span.start + 1) * chunk_bytes
    assert (span.stop - 1) * chunk_bytes < offset + length <= span.stop * chunk_bytes


def test_no_bytes_touch_no_chunk() -> None:
    assert len(chunk_span(5, 0, 4096)) == 0


@given(st.sets(st.integers(0, 200)))
def test_runs_are_maximal_and_hold_each_index_once(indexes: set[int]) -> None:
    found = list(runs(sorted(indexes)))
    assert [index for run in found for index in run] == sorted(indexes)
    assert all(a.stop < b.start for a, b in itertools.pairwise(found))


@given(offset=st.integers(0, 2**60), length=st.integers(1, 2**40), more=st.integers(0, 2**40))
def test_a_content_range_is_read_as_it_was_written(offset: int, length: int, more: int) -> None:
    last = offset + length - 1
    parsed = parse_content_range(f"bytes {offset}-{last}/{last + 1 + more}")
    assert (parsed.first, parsed.last, parsed.total) == (offset, last, last + 1 + more)
    assert range_header(offset, length) == f"bytes={offset}-{last}"


def test_a_total_that_is_not_told_is_none() -> None:
    assert parse_content_range("bytes 0-9/*").total is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bytes",
        "bytes 5-4/10",
        "bytes 0-10/10",
        "items 0-1/2",
        "bytes 0-1",
        "bytes -1-1/2",
        "bytes \u0660-\u0661/\u0662",
    ],
)
def test_an_impossible_content_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Content-Range"):
        parse_content_range(text)


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parsed = parse_content_range(text)
    except ValueError:
        return
    assert parsed.first <= parsed.last


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 4)), max_size=30))
def test_the_longest_run_of_zeros_is_found(parts: list[tuple[int, int]]) -> None:
    states = b"".join(bytes(zeros) + bytes([state]) for zeros, state in parts)
    found = longest_zero_run(states)
    lengths = [len(run) for run in states.translate(bytes(0 if not value else 1 for value in range(256))).split(b"\1")]
    assert len(found) == max(lengths, default=0)
    assert not any(states[found.start : found.stop])
    if found:
        assert states.find(bytes(len(found))) == found.start, "the first of several"

"""Windows of chunks: always missing ones, never empty, and as few bytes as a real boot bears."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.link_estimate import UNMEASURED, parameters_for
from basefs.core.readahead import MISSING, ReadaheadPolicy, window_ahead, window_for_miss

POLICY = ReadaheadPolicy.for_chunks(65536, 8 << 20, UNMEASURED)
TRACE = Path(__file__).parents[2] / "tools" / "bench" / "debian12-boot.json"
states_strategy = st.lists(st.sampled_from([MISSING, 1, 2, 3]), min_size=1, max_size=400).map(bytearray)
policies = st.builds(
    ReadaheadPolicy.for_chunks,
    st.sampled_from([16384, 65536, 262144, 4 << 20]),
    st.sampled_from([4 << 20, 8 << 20, 64 << 20]),
    st.floats(0, 1e9).map(parameters_for),
)


@given(states_strategy, st.data(), policies)
def test_a_window_holds_missing_chunks_from_the_miss_on(
    states: bytearray, data: st.DataObject, policy: ReadaheadPolicy
) -> None:
    missing = [index for index, state in enumerate(states) if state == MISSING]
    if not missing:
        return
    index = data.draw(st.sampled_from(missing))
    wanted = data.draw(st.integers(1, 40))
    window = window_for_miss(states, index, wanted, policy)
    assert window.chunks.start == index
    assert 1 <= len(window.chunks) <= policy.window_max
    assert all(states[chunk] == MISSING for chunk in window.chunks)
    assert window.marker is None or window.marker in window.chunks


@given(states_strategy, st.data(), policies)
def test_a_window_ahead_holds_missing_chunks_near_its_marker(
    states: bytearray, data: st.DataObject, policy: ReadaheadPolicy
) -> None:
    marker = data.draw(st.integers(0, len(states) - 1))
    previous = data.draw(st.integers(1, policy.window_max))
    window = window_ahead(states, marker, previous, policy)
    if window is None:
        return
    assert marker <= window.chunks.start <= marker + 2 * previous
    assert 1 <= len(window.chunks) <= policy.window_max
    assert all(states[chunk] == MISSING for chunk in window.chunks)


def _replay(reads: list[tuple[int, int]], chunks: int) -> tuple[int, int, int]:
    """(chunks fetched, requests, misses) for these reads, when every request is done at once."""
    states = bytearray(chunks)
    markers: dict[int, int] = {}
    fetched = requests = misses = 0
    for offset, length in reads:
        first, last = offset // 65536, (offset + length - 1) // 65536
        for marker in [index for index in markers if first <= index <= last]:
            window = window_ahead(states, marker, markers.pop(marker), POLICY)
            if window is not None:
                states[window.chunks.start : window.chunks.stop] = b"\1" * len(window.chunks)
                fetched, requests = fetched + len(window.chunks), requests + 1
                if window.marker is not None:
                    markers[window.marker] = len(window.chunks)
        for index in range(first, last + 1):
            if states[index] == MISSING:
                window = window_for_miss(states, index, last + 1 - index, POLICY)
                states[window.chunks.start : window.chunks.stop] = b"\1" * len(window.chunks)
                fetched, requests, misses = fetched + len(window.chunks), requests + 1, misses + 1
                if window.marker is not None:
                    markers[window.marker] = len(window.chunks)
    return fetched, requests, misses


def test_a_real_boot_fetches_less_than_twice_what_it_reads() -> None:
    reads = [(offset, length) for offset, length in json.loads(TRACE.read_text())]
    touched = {c for offset, length in reads for c in range(offset // 65536, (offset + length - 1) // 65536 + 1)}
    fetched, requests, _ = _replay(reads, 3 * 2**30 // 65536)
    assert fetched <= 1.75 * len(touched)
    assert requests <= 240


@pytest.mark.parametrize("read_bytes", [4096, 131072, 1 << 20])
def test_a_sequential_reader_misses_hardly_ever(read_bytes: int) -> None:
    reads = [(offset, read_bytes) for offset in range(0, 256 << 20, read_bytes)]
    fetched, requests, misses = _replay(reads, 8192)
    assert misses <= 8
    assert requests <= 50
    assert fetched * 65536 <= (256 << 20) + 2 * (8 << 20) + (8 << 20)

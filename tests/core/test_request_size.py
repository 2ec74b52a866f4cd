"""How large background requests are: by the pace of the last ones, within bounds."""

from hypothesis import given
from hypothesis import strategies as st

from basefs.core.request_size import BYTES_FIRST, BYTES_MAX, BYTES_MIN, MIB, REQUEST_S, RequestSize


def test_a_request_is_for_what_comes_within_its_time():
    size = RequestSize()
    assert size.bytes == BYTES_FIRST
    for _ in range(20):
        size.came(510 * MIB, 2.5)
    assert size.bytes == int(204 * REQUEST_S) * MIB


def test_on_a_slow_link_requests_are_small():
    size = RequestSize()
    for _ in range(20):
        size.came(3 * MIB, 1.0)
    assert size.bytes == BYTES_MIN


def test_one_odd_request_counts_for_half():
    size = RequestSize()
    for _ in range(20):
        size.came(204 * MIB, 1.0)
    size.came(MIB, 1000.0)
    assert size.bytes == int(102 * REQUEST_S) * MIB


def test_a_burst_does_not_outweigh_the_slow_requests_after_it():
    size = RequestSize()
    size.came(MIB, 1e-6)
    for _ in range(4):
        size.came(10 * MIB, 1.0)
    assert size.bytes <= BYTES_MAX // 8


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(1e-9, 1e6))))
def test_whatever_came_the_size_is_whole_mib_within_the_bounds(came):
    size = RequestSize()
    for length, seconds in came:
        size.came(length, seconds)
    assert BYTES_MIN <= size.bytes <= BYTES_MAX
    assert size.bytes % MIB == 0


def test_two_requests_that_keep_a_processor_busy_are_fast():
    size = RequestSize()
    assert not size.is_fast
    for _ in range(20):
        size.came(150 * MIB, 1.0)
    assert not size.is_fast
    for _ in range(20):
        size.came(170 * MIB, 1.0)
    assert size.is_fast

"""When a request is late, and that second requests stay a small share whatever happens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.hedging import (
    BYTES_BURST,
    BYTES_SHARE,
    LATE_MIN_S,
    REQUESTS_BURST,
    REQUESTS_SHARE,
    SAMPLES_MAX,
    SAMPLES_MIN,
    Hedges,
)

KIB = 1024


def known(silence_s: float, length: int = 256 * KIB, requests: int = SAMPLES_MIN) -> Hedges:
    hedges = Hedges()
    for _ in range(requests):
        hedges.came(length, silence_s)
    return hedges


def test_nothing_is_late_before_there_were_a_hundred_of_its_size() -> None:
    assert known(0.2, requests=SAMPLES_MIN - 1).late_after_s(256 * KIB) is None
    hedges = known(0.2)
    assert hedges.late_after_s(300 * KIB) is not None
    assert hedges.late_after_s(1024 * KIB) is None, "larger ones take longer"


def test_late_is_what_one_of_a_hundred_is() -> None:
    hedges = known(0.2, requests=98)
    hedges.came(256 * KIB, 0.7)
    hedges.came(256 * KIB, 30.0)
    assert hedges.late_after_s(256 * KIB) == 0.7


def test_where_all_take_the_same_time_late_is_twice_that() -> None:
    assert known(0.2).late_after_s(256 * KIB) == pytest.approx(0.4)
    assert known(0.004).late_after_s(256 * KIB) == LATE_MIN_S


def test_a_link_that_got_slow_makes_nothing_late_for_long() -> None:
    hedges = known(0.01, requests=SAMPLES_MAX)
    for _ in range(SAMPLES_MAX):
        hedges.came(256 * KIB, 2.0)
    assert hedges.late_after_s(256 * KIB) == pytest.approx(4.0)


@given(st.lists(st.tuples(st.integers(1, 8 << 20), st.booleans()), max_size=400))
def test_second_requests_are_a_small_share_of_demand(requests: list[tuple[int, bool]]) -> None:
    hedges = Hedges()
    asked = spent = 0
    for length, is_late in requests:
        if is_late and hedges.may_spend(length):
            spent += length
        hedges.came(length, 0.01)
        asked += length
    assert hedges.hedged <= REQUESTS_BURST + REQUESTS_SHARE * len(requests)
    assert spent <= BYTES_BURST + BYTES_SHARE * asked
    if not any(length > BYTES_SHARE * asked for length, _ in requests):
        assert spent <= BYTES_SHARE * asked + 1


def test_a_hundred_requests_save_two_second_ones_and_no_more_than_three_are_saved() -> None:
    hedges = known(0.01, requests=101)
    assert [hedges.may_spend(256 * KIB) for _ in range(3)] == [True, True, False]
    hedges = known(0.01, requests=5000)
    assert [hedges.may_spend(256 * KIB) for _ in range(4)] == [True, True, True, False]

"""How requests follow the link: nothing beyond the bounds, more for a longer link, and no going back and forth."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basefs.core.link_estimate import (
    BODY_BYTES_MIN,
    GAP_BYTES_MAX,
    IN_FLIGHT_MAX,
    IN_FLIGHT_MIN,
    KIB,
    MISS_BYTES_MAX,
    SAMPLES_MAX,
    SAMPLES_MIN,
    UNMEASURED,
    WINDOW_BYTES_MAX,
    WINDOW_BYTES_MIN,
    FetchParameters,
    LinkEstimate,
    parameters_for,
)

GLANCE_S = 0.006
"""What Glance takes to answer a request on a loopback."""


def measured(round_trip_s: float, bits_s: float, requests: int = SAMPLES_MAX) -> LinkEstimate:
    estimate = LinkEstimate()
    for _ in range(requests):
        _request(estimate, round_trip_s, bits_s)
    return estimate


def _request(estimate: LinkEstimate, round_trip_s: float, bits_s: float, noise: float = 1.0) -> None:
    """One of 256 KiB, in pieces of 64."""
    bytes_s = bits_s / 8 / noise
    first_byte_s = (round_trip_s + GLANCE_S) * noise
    estimate.began(first_byte_s + 64 * KIB / bytes_s, piece_bytes=64 * KIB, was_alone=True)
    estimate.came(192 * KIB, bytes_s)


@pytest.mark.parametrize(
    ("round_trip_s", "bits_s", "window", "gap", "in_flight"),
    [
        (0.0003, 1e9, 448, 128, 10),
        (0.010, 1e9, 448, 128, 19),
        (0.100, 1e9, 448, 128, 32),
        (0.010, 200e6, 384, 86, 7),
        (0.020, 50e6, 128, 43, 5),
        (0.001, 50e6, 128, 13, 4),
    ],
)
def test_a_link_is_measured_and_requests_fit_it(
    round_trip_s: float, bits_s: float, window: int, gap: int, in_flight: int
) -> None:
    estimate = measured(round_trip_s, bits_s)
    assert estimate.first_byte_s == pytest.approx(round_trip_s + GLANCE_S, rel=0.1)
    assert estimate.bytes_s == pytest.approx(bits_s / 8)
    found = estimate.parameters
    assert (found.window_bytes // KIB, found.gap_bytes // KIB, found.in_flight) == (window, gap, in_flight)


def test_before_there_are_enough_measurements_nothing_is_concluded() -> None:
    assert measured(0.02, 50e6, SAMPLES_MIN - 1).parameters == UNMEASURED
    assert measured(0.02, 50e6, SAMPLES_MIN).parameters != UNMEASURED


@given(st.floats(0, 1e12))
def test_no_pipe_leads_beyond_the_bounds(pipe_bytes: float) -> None:
    _check(parameters_for(pipe_bytes))


def _check(found: FetchParameters) -> None:
    assert WINDOW_BYTES_MIN <= found.window_bytes <= WINDOW_BYTES_MAX
    assert found.window_bytes <= found.miss_bytes_max <= MISS_BYTES_MAX
    assert 0 <= found.gap_bytes <= GAP_BYTES_MAX
    assert IN_FLIGHT_MIN <= found.in_flight <= IN_FLIGHT_MAX


@given(st.floats(0, 1e10), st.floats(0, 1e10))
def test_a_larger_pipe_makes_nothing_smaller(one: float, other: float) -> None:
    small, large = parameters_for(min(one, other)), parameters_for(max(one, other))
    for name in FetchParameters.__slots__:
        assert getattr(small, name) <= getattr(large, name)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e3), st.integers(1, 1 << 23), st.booleans(), st.integers(1, 1 << 23), st.floats(1, 1e12)
        ),
        max_size=100,
    )
)
def test_whatever_is_measured_requests_stay_within_the_bounds(
    requests: list[tuple[float, int, bool, int, float]],
) -> None:
    estimate = LinkEstimate()
    for first_byte_s, piece_bytes, was_alone, length, bytes_s in requests:
        estimate.began(first_byte_s, piece_bytes=piece_bytes, was_alone=was_alone)
        estimate.came(length, bytes_s)
        _check(estimate.parameters)


@settings(deadline=None)
@given(st.floats(0.0001, 0.2), st.floats(1e7, 2e10), st.randoms(use_true_random=False))
def test_noise_of_a_tenth_changes_nothing_twice(round_trip_s: float, bits_s: float, rng: random.Random) -> None:
    estimate = LinkEstimate()
    seen = []
    for _ in range(3 * SAMPLES_MAX):
        _request(estimate, round_trip_s, bits_s, noise=rng.uniform(0.95, 1.05))
        if not seen or seen[-1] != estimate.parameters:
            seen.append(estimate.parameters)
    assert len(seen) <= 3, "before it was measured, then, and once for what was measured badly at first"


def test_another_link_is_noticed() -> None:
    estimate = measured(0.02, 50e6)
    for _ in range(SAMPLES_MAX):
        _request(estimate, 0.0003, 1e9)
    assert estimate.parameters == measured(0.0003, 1e9).parameters


def test_a_queue_of_our_own_is_no_longer_link() -> None:
    estimate = measured(0.010, 1e9)
    before = estimate.parameters
    for _ in range(10 * SAMPLES_MAX):
        estimate.began(0.5, piece_bytes=64 * KIB, was_alone=False)
    assert estimate.parameters == before
    for _ in range(SAMPLES_MAX):
        estimate.began(0.001, piece_bytes=64 * KIB, was_alone=False)
    assert estimate.parameters != before, "one that was quicker than what is known counts in any case"


def test_what_was_in_the_sockets_buffer_tells_no_rate() -> None:
    estimate = LinkEstimate()
    for _ in range(SAMPLES_MAX):
        estimate.came(BODY_BYTES_MIN - 1, 1e12)
    assert estimate.bytes_s is None


def test_a_slow_body_among_fast_ones_is_its_source() -> None:
    estimate = measured(0.0, 1e9)
    for _ in range(SAMPLES_MAX // 2):
        estimate.came(192 * KIB, 1e6)
    assert estimate.bytes_s == pytest.approx(1e9 / 8)

"""The breaker against a model of an endpoint that comes and goes."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from basefs.core.breaker import (
    PROBE_CAP_S,
    PROBE_PAUSE_MIN_S,
    PROBES_TO_OPEN,
    RETRY_AFTER_MAX_S,
    Breaker,
)


def opened(now: float = 0.0, jitter: float = 0.5) -> Breaker:
    breaker = Breaker(lambda: jitter)
    breaker.failed(now)
    for _ in range(PROBES_TO_OPEN):
        breaker.probe_failed(now)
    return breaker


def test_ordinary_failures_make_a_probe_due_and_never_open_it() -> None:
    breaker = Breaker(lambda: 0.5)
    assert breaker.probe_at == math.inf
    for now in range(100):
        breaker.failed(now)
    assert (breaker.state, breaker.since, breaker.probe_at) == ("suspected", 0, 0)


def test_failed_probes_open_it_and_any_answer_closes_it() -> None:
    breaker = opened(5.0)
    assert (breaker.state, breaker.since) == ("open", 5.0)
    breaker.answered(9.0)
    assert (breaker.state, breaker.since, breaker.probe_at) == ("closed", 9.0, math.inf)


def test_an_image_that_fails_for_ever_costs_a_probe_a_second_at_most() -> None:
    breaker = Breaker(lambda: 0.5)
    breaker.failed(0.0)
    breaker.answered(0.1)
    breaker.failed(0.2)
    assert breaker.probe_at == 0.1 + PROBE_PAUSE_MIN_S


def test_retry_after_is_honoured_within_a_bound() -> None:
    for asked_s, expected_s in ((5.0, 5.0), (3600.0, RETRY_AFTER_MAX_S)):
        breaker = opened()
        breaker.probe_failed(10.0, retry_after_s=asked_s)
        assert breaker.probe_at == 10.0 + expected_s


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["failed", "answered", "probe_failed", "put_off"]),
        st.floats(0, 100),
    ),
    max_size=60,
)


@given(EVENTS, st.floats(0, 0.999))
@settings(max_examples=200)
def test_whatever_happens_it_opens_by_probes_only_and_always_has_a_probe_due(
    events: list[tuple[str, float]], jitter: float
) -> None:
    breaker, now, probes_failed = Breaker(lambda: jitter), 0.0, 0
    for name, later in events:
        now += later
        if name == "answered" or breaker.state == "closed":
            probes_failed = 0
        elif name == "probe_failed":
            probes_failed += 1
        getattr(breaker, name)(now)
        assert (breaker.state == "open") <= (probes_failed >= PROBES_TO_OPEN)
        assert math.isfinite(breaker.probe_at) == (breaker.state != "closed")
        if breaker.state == "open" and name == "probe_failed":
            assert now < breaker.probe_at <= now + PROBE_CAP_S


@given(st.floats(0, 5000), st.floats(0, 0.999), st.floats(0.001, 2.5))
def test_an_endpoint_that_is_back_is_found_within_five_seconds(
    away_s: float, jitter: float, probe_takes_s: float
) -> None:
    breaker = opened(jitter=jitter)
    now = breaker.probe_at
    while now < away_s:  # a probe that begins before the end of the outage fails when it has taken its time
        breaker.probe_failed(now + probe_takes_s)
        now = breaker.probe_at
    assert now - max(away_s, 1.0) <= 5.0

"""The pace of background work: over any time no more than the rate allows, and one piece."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.token_bucket import TokenBucket


@given(
    rate=st.integers(1, 1 << 30),
    steps=st.lists(st.tuples(st.integers(1, 1 << 24), st.floats(0, 100, allow_nan=False)), min_size=1, max_size=40),
)
def test_no_time_sees_more_than_the_rate_and_one_piece(rate: int, steps: list[tuple[int, float]]) -> None:
    bucket, now, begun = TokenBucket(rate), 0.0, []
    for length, pause in steps:
        now += pause
        at = bucket.take(length, now)
        assert at >= now
        begun.append((at, length))
    for first, (start, _) in enumerate(begun):
        moved = 0
        for at, length in begun[first:]:
            moved += length
            assert moved - length <= (at - start) * rate * (1 + 1e-9) + 1


def test_what_was_not_used_is_not_saved_up() -> None:
    bucket = TokenBucket(100)
    assert bucket.take(100, 0.0) == 0.0
    assert bucket.take(100, 50.0) == 50.0
    assert bucket.take(100, 50.0) == 51.0


@pytest.mark.parametrize(("moved", "next_at"), [(100, 1.0), (0, 0.0), (50, 0.5), (300, 3.0)])
def test_what_was_moved_counts_not_what_was_taken(moved: int, next_at: float) -> None:
    bucket = TokenBucket(100)
    bucket.take(100, 0.0)
    bucket.correct(moved - 100)
    assert bucket.take(1, 0.0) == next_at

"""When a source that failed is read from again, and which source a location is one of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.location_kinds import SOURCE_NAMES, endpoint_of, kind_of
from basefs.core.source_rest import SourceRest


def test_a_source_that_failed_rests_longer_each_time_and_is_good_after_a_try_that_went_well() -> None:
    rest, now, pauses = SourceRest(base_s=1.0, cap_s=30.0), 0.0, []
    assert rest.is_good
    assert not rest.may_try(1e9), "there is nothing to find out"
    for _ in range(8):
        rest.failed(now, jitter=1.0)
        assert not rest.is_good
        pauses.append(rest.until - now)
        assert not rest.may_try(math.nextafter(rest.until, 0.0))
        assert rest.may_try(rest.until)
        now = rest.until
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    rest.answered()
    assert rest.is_good


def test_requests_that_fail_together_count_as_one() -> None:
    rest = SourceRest(base_s=1.0, cap_s=30.0)
    for _ in range(50):
        rest.failed(5.0, jitter=1.0)
    assert (rest.failures, rest.until) == (1, 6.0)


def test_it_rests_as_long_as_it_is_told_to_at_least() -> None:
    rest = SourceRest(base_s=1.0, cap_s=30.0)
    rest.failed(0.0, jitter=0.0, rest_s_min=12.0)
    assert rest.until == 12.0
    rest.failed(12.0, jitter=0.0, rest_s_min=600.0)
    assert rest.until == 612.0


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from(["failed", "answered"]), st.floats(0, 0.999))))
def test_it_is_good_exactly_while_the_last_word_was_good(steps: list[tuple[float, str, float]]) -> None:
    rest, now, is_good = SourceRest(base_s=1.0, cap_s=30.0), 0.0, True
    for pause, what, jitter in steps:
        now += pause
        if what == "failed":
            rest.failed(now, jitter=jitter)
            is_good = False
        else:
            rest.answered()
            is_good = True
        assert rest.is_good is is_good
        assert not (rest.is_good and rest.may_try(now))
        assert rest.is_good or rest.until - now <= 30.0


@pytest.mark.parametrize(
    ("location", "kind", "endpoint"),
    [
        ("rbd://fsid-1/images/id/snap", "rbd", "fsid-1"),
        ("s3+https://KEY:SECRET@s3.example:443/bucket/id", "s3", "s3.example:443"),
        ("swift+config://ref1/container/id", "swift", "ref1"),
        ("swift+https://tenant%3Auser:key@auth/v1/c/o", "swift", "auth"),
        ("HTTPS://Images.Example:8443/x", "http", "images.example:8443"),
        ("file:///var/lib/glance/images/id", "file", ""),
        ("cinder://store/11111111-1111-1111-1111-111111111111", "volume", "store"),
        ("vmware_datastore://x/y", None, ""),
        ("s3://KEY:SEC/RET@s3.example/bucket/id", "s3", ""),
        ("s3://KEY:12345/RET@s3.example/bucket/id", "s3", ""),
        ("http://[::1/x", "http", ""),
        ("no scheme", None, ""),
        ("", None, ""),
    ],
)
def test_a_location_is_of_one_kind_and_its_endpoint_has_no_key(location: str, kind: str | None, endpoint: str) -> None:
    assert kind_of(location) == kind
    assert endpoint_of(location) == endpoint


@given(st.text())
def test_any_text_is_a_location_of_some_kind_or_none(text: str) -> None:
    assert kind_of(text) in (None, *SOURCE_NAMES)
    assert "@" not in endpoint_of(text)

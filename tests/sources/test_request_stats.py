"""Requests to Glance by kind and status."""

import pytest

from basefs.sources.request_stats import HttpStats, request_kind


@pytest.mark.parametrize(
    ("url", "headers", "is_to_glance", "kind"),
    [
        ("/v2/images/x/file", {"Range": "bytes=0-1"}, True, "range"),
        ("/v2/images/x/file", {}, True, "stream"),
        ("/v2/images?limit=1", None, True, "metadata"),
        ("http://keystone/v3/auth/tokens", None, False, "auth"),
    ],
)
def test_a_request_is_of_one_kind(url: str, headers: dict[str, str] | None, is_to_glance: bool, kind: str) -> None:
    assert request_kind(url, headers, is_to_glance=is_to_glance) == kind


def test_a_request_without_an_answer_is_counted_too() -> None:
    stats = HttpStats()
    stats.add("range", 206, 0.1)
    stats.add("range", None, 5.0)
    assert stats.counts() == {("range", "206"): 1, ("range", "none"): 1}
    assert sum(stats.durations()["range"].counts) == 2

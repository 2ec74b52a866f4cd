"""Locations of rbd, S3 and Swift: what Glance writes is understood, nothing else is, and nothing secret is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.store_location import host_of, is_listed, object_location, rbd_location

SCHEMES = ("s3", "s3+https")
SECRET = "hunter2"


def test_each_part_of_an_rbd_location_is_decoded_by_itself():
    found = rbd_location("rbd://FS-ID/im%2Fages/a%20b/snap")
    assert (found.fsid, found.pool, found.image, found.snapshot) == ("fs-id", "im/ages", "a b", "snap")


@pytest.mark.parametrize(
    "location", ["rbd://a", "rbd://a/b/c", "rbd://a/b/c/d/e", "rbd://a//c/d", "rbd://a/b/c%00/d", "rbd://a/b/%ff/d", ""]
)
def test_what_is_no_rbd_location_is_an_error(location):
    with pytest.raises(ValueError):
        rbd_location(location)


def test_keys_in_an_object_location_are_left_out():
    found = object_location(f"s3+https://KEY:{SECRET}@S3.example:9000/path/bucket/key", SCHEMES)
    assert (found.scheme, found.service, found.bucket, found.key) == (
        "s3+https",
        "s3.example:9000/path",
        "bucket",
        "key",
    )
    assert SECRET not in repr(found)


@pytest.mark.parametrize(
    "location",
    [
        "s3://host/key",
        "s3:///b/k",
        "s3://h/../k",
        "s3://h//k",
        "s3://h/b/k?x",
        "s3://h/b/k#x",
        "s3://http://h/b/k",
        "s3:/h/b/k",
    ],
)
def test_what_names_no_object_is_an_error(location):
    with pytest.raises(ValueError):
        object_location(location, SCHEMES)


@given(st.text(), st.sampled_from(["", "rbd://", "s3://", f"s3://u:{SECRET}@h/", "s3+https://h/b/"]))
def test_no_text_but_a_location_gets_through_and_no_error_repeats_it(text, prefix):
    for parse in (rbd_location, lambda location: object_location(location, SCHEMES)):
        try:
            parse(prefix + text)
        except ValueError as exc:
            assert SECRET not in str(exc)  # noqa: PT017  most texts are refused, not all


def test_hosts_and_names_with_a_star():
    assert host_of("https://User@H.example:1/x") == host_of("h.example:1/y") == "h.example:1"
    assert is_listed("images_1", ("x", "images_*"))
    assert not is_listed("images", ("image", "images_*"))

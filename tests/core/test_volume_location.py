"""Locations of Glance: which of them name a volume."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.volume_location import volume_id_of

VOLUME = "6d54cb90-a5d1-40d8-9cb2-c6adf43a02af"


@pytest.mark.parametrize(
    "location", [f"cinder://{VOLUME}", f"cinder://fast/{VOLUME}", f"cinder://a-b_c/{VOLUME.upper()}"]
)
def test_a_location_of_the_cinder_store_names_its_volume(location):
    assert volume_id_of(location) == VOLUME


@pytest.mark.parametrize(
    "location",
    [
        "",
        "cinder://",
        f"file:///{VOLUME}",
        f"rbd://fsid/pool/{VOLUME}/snap",
        f"http://cinder/{VOLUME}",
        f"cinder://{VOLUME}/",
        f"cinder://{VOLUME}?x",
        f"cinder://a/b/{VOLUME}",
        f"cinder://user:secret@host/{VOLUME}",
        f" cinder://{VOLUME}",
        f"cinder://{VOLUME}\n",
        f"cinder:///{VOLUME}",
        f"cinder://{VOLUME[:-1]}",
        f"cinder://{VOLUME}\0",
        f"cinder://{VOLUME.replace('-', '')}",
    ],
)
def test_anything_else_is_no_volume(location):
    assert volume_id_of(location) is None


@given(st.text() | st.from_regex(r"cinder://.{0,60}"))
def test_whatever_is_read_is_a_volume_id_or_nothing(location):
    found = volume_id_of(location)
    assert found is None or str(uuid.UUID(found)) == found


@given(store=st.none() | st.from_regex(r"[A-Za-z0-9_.-]{1,30}", fullmatch=True), volume=st.uuids())
def test_every_store_and_volume_is_understood(store, volume):
    location = f"cinder://{store}/{volume}" if store else f"cinder://{volume}"
    assert volume_id_of(location) == str(volume)

"""What a map of an image says of it besides its bytes."""

import pytest

from basefs.catalog.records import ImageEntry
from basefs.handlers.report import map_note
from tests.cache.records import record


def entry() -> ImageEntry:
    return ImageEntry(number=7, base_name="0" * 40, record=record("image"))


def test_an_image_as_any_other_needs_no_note():
    assert map_note(entry(), refused_reason=None, state="partial") is None


@pytest.mark.parametrize(
    ("local", "refused_reason", "state", "note"),
    [
        ({}, None, "linked", "linked: it is read from its volume"),
        ({}, "a backing file", "refused", "refused, so nova downloads it by itself: a backing file"),
        ({"is_graduated": True}, None, "graduated", "graduated: all of it is the lower file"),
        ({"whole": "quarantined"}, None, "quarantined", "it has not the hash that Glance tells"),
    ],
)
def test_what_the_cells_do_not_tell_is_a_note(local, refused_reason, state, note):
    image = entry()
    for name, value in local.items():
        setattr(image.local, name, value)
    assert note in map_note(image, refused_reason=refused_reason, state=state)

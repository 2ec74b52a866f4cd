"""Names, inode numbers, back-off."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core import inodes
from basefs.core.names import base_name_of, is_base_name
from basefs.core.retry import backoff_s


@given(st.uuids())
def test_a_base_name_is_the_sha1_nova_makes(image_id: object) -> None:
    name = base_name_of(str(image_id))
    assert name == hashlib.sha1(str(image_id).encode("utf-8")).hexdigest()
    assert is_base_name(name)


@pytest.mark.parametrize("suffix", ["_sm", ".part", ".converted", "_20", "\n", "0", " "])
def test_what_nova_makes_of_a_base_name_is_none(suffix: str) -> None:
    assert not is_base_name("a" * 40 + suffix)


@pytest.mark.parametrize("name", ["", "A" * 40, "g" * 40, "a" * 39, "ephemeral_1_0706d66", "swap_256", "\u0661" * 40])
def test_other_names_are_none(name: str) -> None:
    assert not is_base_name(name)


@given(st.integers(1, 2**32 - 1), st.booleans())
def test_an_inode_and_a_handle_tell_their_image(number: int, is_guest: bool) -> None:
    assert inodes.image_number_of(inodes.image_inode(number)) == number
    assert inodes.link_number_of(inodes.link_inode(number)) == number
    assert inodes.json_number_of(inodes.json_inode(number)) == number
    handle = inodes.image_handle(number, is_guest=is_guest)
    assert inodes.image_of_handle(handle) == (number, is_guest)
    assert handle < inodes.first_other_handle(0)


@given(st.integers(0, 2**64 - 1))
def test_an_inode_is_of_one_kind_at_most(inode: int) -> None:
    kinds = [
        inodes.image_number_of(inode) is not None,
        inodes.link_number_of(inode) is not None,
        inodes.json_number_of(inode) is not None,
        inodes.is_lower(inode),
        inode in (inodes.ROOT, inodes.BASEFS_DIR, inodes.BY_ID_DIR, inodes.IMAGES_DIR, inodes.STATUS_FILE),
    ]
    assert sum(kinds) <= 1


@given(st.integers(1, 1000), st.floats(0, 0.999))
def test_a_back_off_is_bounded_and_spread(attempt: int, jitter: float) -> None:
    wait_s = backoff_s(attempt, base_s=0.25, cap_s=10.0, jitter=jitter)
    step_s = min(10.0, 0.25 * 2.0 ** (attempt - 1)) if attempt < 40 else 10.0
    assert step_s / 2 <= wait_s <= step_s

"""Images over a real Glance through a real mount."""

import hashlib
import os
import random

import pytest

from tests.conftest import MountFactory
from tools.rig import Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance]

IMAGE = random.Random(1).randbytes(3_000_001)


def base_name(image_id: str) -> str:
    return hashlib.sha1(image_id.encode()).hexdigest()


def test_an_image_is_a_file_at_once_with_its_bytes(rig: Rig, basefs_mount: MountFactory) -> None:
    image_id = rig.upload(IMAGE, "a", "raw")
    mount = basefs_mount()
    path = mount.mountpoint / base_name(image_id)
    assert path.stat().st_size == len(IMAGE)
    assert path.read_bytes() == IMAGE
    assert base_name(image_id) in os.listdir(mount.mountpoint)

import json
import os

import pytest

pytestmark = [pytest.mark.mount, pytest.mark.glance]

SIZE = 3_000_000


def test_an_image_is_warmed_shown_and_evicted(basefs_mount, rig):
    image_id = rig.upload(os.urandom(SIZE), "to be warmed")
    mount = basefs_mount()
    mount.cli("image", "warm", image_id)
    shown = mount.image("to be warmed")
    assert (shown["id"], shown["state"], shown["cached_bytes"], shown["size"]) == (image_id, "verified", SIZE, SIZE)
    assert mount.cli("image", "evict", image_id).stdout == "evicted 2.9 MiB\n"
    evicted = mount.image(image_id)
    assert evicted["cached_bytes"] < SIZE
    assert evicted["state"] == "cold"
    listed = {image["id"]: image for image in json.loads(mount.cli("image", "list", "-f", "json").stdout)}
    assert listed[image_id]["name"] == "to be warmed"


def test_a_warming_that_was_handed_over_goes_on_by_itself(basefs_mount, rig):
    image_id = rig.upload(os.urandom(SIZE), "handed over")
    mount = basefs_mount()
    mount.cli("image", "warm", "--no-wait", image_id)
    mount.cli("image", "warm", "--wait", image_id)  # joins it, and tells when it is over
    assert mount.image(image_id)["state"] == "verified"
    assert mount.status()["fetched_bytes"] <= SIZE + 65536


def test_an_open_image_is_not_evicted(basefs_mount, rig):
    image_id = rig.upload(os.urandom(SIZE), "open")
    mount = basefs_mount()
    with mount.path(image_id).open("rb") as file:
        file.read(10)
        done = mount.cli("image", "evict", image_id, check=False)
    assert done.returncode == 1
    assert "is open" in done.stderr

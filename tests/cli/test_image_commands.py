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


def test_a_map_shows_what_was_read_and_what_is_zeros_before_and_after_a_restart(basefs_mount, rig):
    mib = 1 << 20
    image_id = rig.upload(os.urandom(4 * mib) + bytes(4 * mib) + os.urandom(4 * mib), "to be mapped")
    mount = basefs_mount()

    def bytes_now() -> dict[str, int]:
        answer = json.loads(mount.cli("image", "map", image_id, "-f", "json").stdout)
        assert answer["size"] == 12 * mib
        return {kind: answer[f"{kind}_bytes"] for kind in ("present", "zero", "fetching", "missing")}

    assert bytes_now() == {"present": 0, "zero": 0, "fetching": 0, "missing": 12 * mib}
    mount.cli("image", "warm", image_id)
    complete = {"present": 8 * mib, "zero": 4 * mib, "fetching": 0, "missing": 0}
    assert bytes_now() == complete
    mount.unmount()
    mount.start()
    assert bytes_now() == complete  # nobody used it since: from its files
    assert "100 %" not in mount.cli("image", "map", image_id).stdout
    picture = mount.directory / "map.png"
    mount.cli("image", "map", image_id, "--png", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")

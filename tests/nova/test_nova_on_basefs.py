"""nova's own code on a basefs mount: each way in which nova-compute uses `_base`."""

import errno
import json
import os
import stat
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.nova.conftest import (
    MIB,
    NOVA_USER,
    NOVA_USER_OF_GLANCE,
    MountedSite,
    Site,
    lower_directory,
    mounted_site,
    same_guest_bytes,
    tool,
)
from tests.nova.nova_node import NovaError, NovaNode, nova_node
from tools.mount import BasefsMount, base_name
from tools.rig import Rig

pytestmark = [pytest.mark.nova, pytest.mark.mount, pytest.mark.glance]

LONG_AGO = time.time() - 30 * 86400  # beyond every age at which nova's cache manager removes files
GIB = 1 << 30


# -- first boot


def test_first_boot_puts_an_overlay_on_the_base_and_downloads_nothing(site: MountedSite, raw_file: Path) -> None:
    image_id = site.upload(raw_file)
    instance, answer = site.boot(image_id)
    assert answer.result["disks"]["disk"] == {
        "path": str(site.disk(instance)),
        "format": "qcow2",
        "virtual_size": GIB,
        "cluster_size": 65536,
        "backing_file": str(site.path(image_id)),
        "backing_format": "raw",
    }
    assert answer.glance_requests == []
    assert not answer.opened(".part")
    assert not answer.ran(".part")
    assert answer.complaints == []


def test_overlay_of_the_first_boot_holds_the_images_bytes(site: MountedSite, raw_file: Path) -> None:
    instance, _ = site.boot(site.upload(raw_file))
    assert same_guest_bytes(raw_file, site.disk(instance), "qcow2")


def test_first_boot_with_the_header_cached_needs_ten_reads_and_no_glance(site: MountedSite, raw_file: Path) -> None:
    image_id = site.upload(raw_file)
    os.stat(site.path(image_id))  # the name resolves: the checks have read the header
    before = site.control.status()
    requests_before = len(site.rig.requests(image_id))
    site.boot(image_id)
    after = site.control.status()
    spent = {name: after["fuse_requests"][name] - before["fuse_requests"][name] for name in ("read", "getattr")}
    assert spent["read"] <= 10, spent
    assert spent["getattr"] <= 5, spent
    assert after["fetch_requests"] == before["fetch_requests"]
    assert site.rig.requests(image_id)[requests_before:] == []


def test_disks_on_basefs_are_the_disks_nova_makes_by_itself(
    site: MountedSite, plain_site: Site, raw_file: Path
) -> None:
    image_id = site.upload(raw_file)
    plain_site.configure()
    plain_instance, plain = plain_site.boot(image_id, ephemeral_gb=1, swap_mb=16)
    assert plain.downloads, "the other nova has downloaded the image"
    site.configure()
    instance, lazy = site.boot(image_id, ephemeral_gb=1, swap_mb=16)

    def without_places(text: str, of: Site, one: str) -> str:
        return text.replace(str(of.instances_path), "INSTANCES").replace(one, "INSTANCE")

    assert without_places(json.dumps(lazy.result), site, instance).replace(
        json.dumps(lazy.result["base_listing"]), ""
    ) == without_places(json.dumps(plain.result), plain_site, plain_instance).replace(
        json.dumps(plain.result["base_listing"]), ""
    )


def test_second_boot_shares_the_base(site: MountedSite, raw_file: Path) -> None:
    image_id = site.upload(raw_file)
    _, first = site.boot(image_id)
    _, second = site.boot(image_id, root_gb=2)
    assert second.result["disks"]["disk"]["backing_file"] == first.result["disks"]["disk"]["backing_file"]
    assert second.glance_requests == []


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "compressed"])
def test_first_boot_of_a_qcow2_image_puts_the_overlay_on_the_raw_disk_in_it(
    site: MountedSite, raw_file: Path, tmp_path: Path, *, packed: bool
) -> None:
    file = tmp_path / "image"
    convert = ["qemu-img", "convert", *(["-c"] if packed else []), "-f", "raw", "-O", "qcow2", raw_file, file]
    subprocess.run(convert, check=True)
    image_id = site.upload(file, "qcow2")
    instance, answer = site.boot(image_id, disk_format="qcow2")
    disk = answer.result["disks"]["disk"]
    assert (disk["backing_file"], disk["backing_format"]) == (str(site.path(image_id)), "raw")
    assert answer.downloads == []
    assert not answer.opened(".part")
    assert not answer.ran("qemu-img convert")
    assert answer.complaints == []
    assert site.path(image_id).stat().st_size == -(-raw_file.stat().st_size // 512) * 512
    assert same_guest_bytes(raw_file, site.disk(instance), "qcow2")


# -- what basefs hides, nova downloads


@pytest.mark.parametrize("disk_format", ["vmdk"])
def test_image_that_basefs_hides_is_downloaded_by_nova_into_the_lower_directory(
    site: MountedSite, raw_file: Path, request: pytest.FixtureRequest, disk_format: str
) -> None:
    image_id = site.upload(request.getfixturevalue(f"{disk_format}_file"), disk_format)
    instance, answer = site.boot(image_id, disk_format=disk_format)
    name = base_name(image_id)
    assert answer.downloads == [f"GET /v2/images/{image_id}/file"]
    assert answer.opened(f"{name}.part")
    assert answer.ran("qemu-img convert", f"{name}.part", f"{name}.converted")
    assert [entry for entry in answer.result["base_listing"] if entry.startswith(name)] == [name]
    assert answer.result["disks"]["disk"]["backing_format"] == "raw"
    assert answer.complaints == []
    assert same_guest_bytes(raw_file, site.disk(instance), "qcow2")
    # It is nova's own file from now on, as it is on a disk with sectors of 4096 bytes, which is what qemu-img takes a
    # FUSE file for: O_DIRECT reads of one byte succeed there.
    converted = os.stat(site.path(image_id))
    assert converted.st_mode == stat.S_IFREG | 0o644
    assert converted.st_size == -(-raw_file.stat().st_size // 4096) * 4096
    assert same_guest_bytes(raw_file, site.path(image_id), "raw")


def test_image_that_is_not_its_disk_format_is_refused_by_nova_as_without_basefs(
    site: MountedSite, qcow2_file: Path
) -> None:
    image_id = site.upload(qcow2_file, "raw")
    with pytest.raises(NovaError) as raised:
        site.boot(image_id)
    assert raised.value.kind == "ImageUnacceptable"
    assert not [name for name in os.listdir(site.base) if name.startswith(base_name(image_id))]
    assert "qcow2" in site.control.image(image_id)["refused_reason"]


def test_image_id_that_glance_does_not_know_is_not_found(site: MountedSite) -> None:
    with pytest.raises(NovaError) as raised:
        site.boot(str(uuid.uuid4()))
    assert raised.value.kind == "ImageNotFound"


# -- ephemeral and swap disks


def test_ephemeral_and_swap_bases_are_novas_files_in_the_lower_directory(
    site: MountedSite, raw_file: Path, tmp_path: Path
) -> None:
    _, answer = site.boot(site.upload(raw_file), ephemeral_gb=2, swap_mb=24)
    assert answer.complaints == []
    bases = {"disk.local": "ephemeral_2_40d1d2c", "disk.swap": "swap_24"}
    for disk, name in bases.items():
        assert answer.result["disks"][disk]["backing_file"] == str(site.base / name)
        assert answer.result["disks"][disk]["backing_format"] == "raw"
    with lower_directory(site, tmp_path) as lower:
        assert {name: _content_of(lower / name) for name in bases.values()} == dict(
            zip(bases.values(), ("ext4", "swap"), strict=True)
        )
        assert (lower / "ephemeral_2_40d1d2c").owner() == NOVA_USER
        assert (lower / "ephemeral_2_40d1d2c").stat().st_blocks * 512 < 200 * MIB, "sparse, as mkfs left it"


def _content_of(path: Path) -> str:
    argv = [tool("blkid"), "-p", "-s", "TYPE", "-o", "value", str(path)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


# -- the image cache manager


def test_cache_manager_finds_the_image_in_use_and_touches_it(site: MountedSite, raw_file: Path) -> None:
    image_id = site.upload(raw_file)
    name = base_name(image_id)
    instance, _ = site.boot(image_id, ephemeral_gb=1, swap_mb=16)
    os.utime(site.path(image_id), (LONG_AGO, LONG_AGO))
    answer = site.node.manage_image_cache(uuids=[instance])
    assert answer.result["active"] == [name]
    assert name not in answer.result["removable"]
    assert answer.messages("ERROR") == []
    assert not [complaint for complaint in answer.complaints if name in complaint or "no back files" in complaint]
    assert site.node.look(name=name).result["mtime"] > LONG_AGO + 86400


def test_cache_manager_evicts_an_unused_image_whose_name_still_resolves(site: MountedSite, raw_file: Path) -> None:
    image_id = site.upload(raw_file)
    name = base_name(image_id)
    site.boot(image_id)
    os.utime(site.path(image_id), (LONG_AGO, LONG_AGO))
    answer = site.node.manage_image_cache(uuids=[])
    assert name in answer.result["removable"]
    assert f"Removing base, swap or ephemeral file: {site.path(image_id)}" in answer.messages("INFO")
    assert answer.messages("ERROR") == []
    assert site.control.image(image_id)["cached_bytes"] == 0
    assert site.rig.api().get(image_id)["status"] == "active"
    seen = site.node.look(name=name).result
    assert seen["size"] == raw_file.stat().st_size
    assert name not in seen["listing"]
    instance, _ = site.boot(image_id)
    assert same_guest_bytes(raw_file, site.disk(instance), "qcow2")


def test_cache_manager_leaves_a_young_unused_image(site: MountedSite, raw_file: Path) -> None:
    image_id = site.upload(raw_file)
    site.boot(image_id)
    answer = site.node.manage_image_cache(uuids=[])
    assert f"Base, swap or ephemeral file too young to remove: {site.path(image_id)}" in answer.messages("INFO")
    assert site.control.image(image_id)["cached_bytes"] > 0


def test_cache_manager_removes_unused_ephemeral_and_swap_bases(site: MountedSite, raw_file: Path) -> None:
    site.boot(site.upload(raw_file), ephemeral_gb=1, swap_mb=16)
    for name in ("ephemeral_1_40d1d2c", "swap_16"):
        os.utime(site.base / name, (LONG_AGO, LONG_AGO))
    answer = site.node.manage_image_cache(uuids=[])
    assert answer.messages("ERROR") == []
    left = site.node.look(name="swap_16").result
    assert left["errno"] == errno.ENOENT
    assert "ephemeral_1_40d1d2c" not in left["listing"]


def test_cache_manager_neither_hears_of_images_nobody_has_used_nor_asks_glance(
    nova: NovaNode, rig: Rig, basefs_mount: MountFactory, raw_file: Path
) -> None:
    used = rig.api(NOVA_USER_OF_GLANCE).upload(raw_file, "used")
    untouched = rig.clone(used, 20)
    # Refreshes of the catalog by the clock are not what is counted.
    site = mounted_site(nova, basefs_mount(options={"catalog_refresh_s": 3600}, start=False), rig)
    instance, _ = site.boot(used)
    assert os.stat(site.path(untouched[0])).st_size == raw_file.stat().st_size
    assert base_name(untouched[0]) in os.listdir(site.base), "root sees every image"
    requests_before = len(rig.requests())
    answer = site.node.manage_image_cache(uuids=[instance])
    assert answer.result["active"] == [base_name(used)]
    assert answer.result["removable"] == []
    assert answer.complaints == []
    # nova has also looked for the image of no kernel and no ramdisk: the SHA-1 of "".
    assert rig.requests()[requests_before:] == []


def test_cache_manager_of_a_nova_that_runs_as_root_takes_no_image_for_old(
    rig: Rig, shared_mount: BasefsMount, raw_file: Path
) -> None:
    image_id = rig.upload(raw_file, "never used")
    with nova_node("nova34", None) as root:
        site = MountedSite(root, shared_mount.instances_path, rig, shared_mount)
        site.configure()
        os.stat(site.path(image_id))
        answer = root.manage_image_cache(uuids=[])
    assert f"Base, swap or ephemeral file too young to remove: {site.path(image_id)}" in answer.messages("INFO")
    assert answer.messages("ERROR") == []
    assert not [message for message in answer.messages("INFO") if message.startswith("Removing base")]


# -- pre-caching


def test_precache_finds_the_image_there_and_starts_its_hydration(site: MountedSite, raw_file: Path) -> None:
    image_id = site.upload(raw_file)
    answer = site.node.precache(image_ids=[image_id])
    assert answer.result == {image_id: False}
    assert answer.glance_requests == []
    assert answer.complaints == []
    assert site.control.image(image_id)["state"] in ("hydrating", "verified")
    for _progress in site.control.warm(image_id):
        pass
    assert site.control.image(image_id)["cached_bytes"] == raw_file.stat().st_size
    assert _bytes_served(site, image_id) == raw_file.stat().st_size
    instance, _ = site.boot(image_id)
    assert same_guest_bytes(raw_file, site.disk(instance), "qcow2")
    assert _bytes_served(site, image_id) == raw_file.stat().st_size, "no byte came twice"


def test_first_boot_does_not_start_the_hydration_that_precaching_does(site: MountedSite, raw_file: Path) -> None:
    image_id = site.upload(raw_file)
    site.boot(image_id)
    assert site.control.image(image_id)["state"] == "partial"
    assert _bytes_served(site, image_id) <= MIB


def _bytes_served(site: MountedSite, image_id: str) -> int:
    requests = site.rig.requests(f"/v2/images/{image_id}/file")
    return sum(one.length for one in requests if one.method == "GET")


# -- a life after the first boot


def test_hard_reboot_with_the_overlay_there_changes_and_downloads_nothing(site: MountedSite, raw_file: Path) -> None:
    instance, booted = site.boot(site.upload(raw_file), ephemeral_gb=1, swap_mb=16)
    overlay = site.disk(instance).read_bytes()
    answer = site.node.hard_reboot(uuid=instance)
    assert answer.result["disks"] == booted.result["disks"]
    assert answer.glance_requests == []
    assert not answer.ran("qemu-img create")
    assert answer.complaints == []
    assert site.disk(instance).read_bytes() == overlay


def test_cold_snapshot_holds_the_images_bytes(site: MountedSite, raw_file: Path) -> None:
    instance, _ = site.boot(site.upload(raw_file))
    answer = site.node.snapshot(uuid=instance, name="snapshot")
    assert answer.complaints == []
    stored = Path(site.rig.data_path(answer.result["snapshot_id"]))
    assert same_guest_bytes(raw_file, stored, "qcow2")


def test_rescue_disk_lies_on_the_rescue_images_base(site: MountedSite, raw_file: Path, tmp_path: Path) -> None:
    instance, _ = site.boot(site.upload(raw_file))
    rescue_file = tmp_path / "rescue.raw"
    rescue_file.write_bytes(raw_file.read_bytes()[: 6 * MIB][::-1])
    rescue_id = site.upload(rescue_file)
    answer = site.node.rescue(uuid=instance, image_id=rescue_id)
    assert answer.result["disks"]["disk.rescue"]["backing_file"] == str(site.path(rescue_id))
    assert answer.result["disks"]["disk.rescue"]["backing_format"] == "raw"
    assert answer.glance_requests == []
    assert same_guest_bytes(rescue_file, site.disk(instance, "disk.rescue"), "qcow2")


def test_unshelved_disk_is_rebased_onto_the_original_image(site: MountedSite, raw_file: Path) -> None:
    image_id = site.upload(raw_file)
    instance, _ = site.boot(image_id, root_gb=0)  # a disk of the image's size: qemu-img rebase reads all of it, twice
    snapshot_id = site.node.snapshot(uuid=instance, name="shelved").result["snapshot_id"]
    unshelved = str(uuid.uuid4())
    answer = site.node.unshelve(uuid=unshelved, image_id=image_id, snapshot_id=snapshot_id, root_gb=0)
    assert answer.ran("qemu-img rebase", base_name(image_id))
    assert answer.result["disks"]["disk"]["backing_file"] == str(site.path(image_id))
    assert answer.result["disks"]["disk"]["backing_format"] == "raw"
    assert image_id not in " ".join(answer.downloads)
    assert answer.complaints == []
    assert same_guest_bytes(raw_file, site.disk(unshelved), "qcow2")


def test_flat_backend_copies_the_base(site: MountedSite, raw_file: Path) -> None:
    site.configure(libvirt={"images_type": "raw"})
    instance, answer = site.boot(site.upload(raw_file))
    assert answer.result["disks"]["disk"]["format"] == "raw"
    assert answer.glance_requests == []
    assert answer.complaints == []
    assert same_guest_bytes(raw_file, site.disk(instance), "raw")


# -- Glance is away


def test_image_with_its_header_cached_boots_while_glance_is_away(
    nova: NovaNode, own_rig: Rig, basefs_mount: MountFactory, raw_file: Path
) -> None:
    site = mounted_site(nova, basefs_mount(own_rig, start=False), own_rig)
    image_id = site.upload(raw_file)
    os.stat(site.path(image_id))
    own_rig.stop_service("glance")
    _, answer = site.boot(image_id)
    assert answer.result["disks"]["disk"]["backing_format"] == "raw"
    assert answer.complaints == []

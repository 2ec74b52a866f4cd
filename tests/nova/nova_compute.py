"""The commands of `nova_driver.py`: what a nova-compute does to `_base`, by nova's own LibvirtDriver.

Real: LibvirtDriver with its imagebackend, imagecache, blockinfo, images, GlanceImageServiceV2, glanceclient, privsep.
Stood in for: the database (instances are objects made here, block device mappings are handed over) and libvirt (a
shut-off guest with the domain XML nova would have written). Runs in a venv of nova's.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from typing import Any

import nova.conf
from nova import config as nova_config
from nova import objects, version
from nova.compute import vm_states
from nova.image import glance
from nova.virt.libvirt import blockinfo, imagebackend, imagecache
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt.volume import remotefs
from nova_parts import DEVICES, HOST, Host, block_device_mappings, domain_xml, new_instance, user_context

CONF = nova.conf.CONF


def prepare_nova() -> None:
    """Do what nova-compute's start does to the process: options parsed, objects registered."""
    nova_config.parse_args(["nova-compute"], default_config_files=[])
    objects.register_all()
    for name, value, group in (
        ("host", HOST, None),
        ("default_ephemeral_format", "ext4", None),
        ("virt_type", "qemu", "libvirt"),
    ):
        CONF.set_override(name, value, group=group)


class Compute:
    """One compute node; every ``do_`` method is a command, its arguments are the command's."""

    def __init__(self) -> None:
        self.instances_path: str | None = None
        self._instances: dict[str, objects.Instance] = {}
        self._overrides: list[tuple[str, str | None]] = []

    def version(self) -> str:
        """Give nova's version."""
        return str(version.version_string())

    def do_configure(
        self, *, instances_path: str, glance_url: str, token: str, options: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """Be another compute node: its folders, its Glance, the user's token, ``options[section][name]``."""
        wanted: dict[str, dict[str, Any]] = {
            "DEFAULT": {"instances_path": instances_path},
            "oslo_concurrency": {"lock_path": os.path.join(instances_path, "locks")},
            "glance": {"api_servers": [glance_url]},
        }
        for section, values in (options or {}).items():
            wanted[section] = wanted.get(section, {}) | values
        for name, group in self._overrides:
            CONF.clear_override(name, group=group)
        self._overrides = []
        for section, values in wanted.items():
            group = None if section == "DEFAULT" else section
            for name, value in values.items():
                CONF.set_override(name, value, group=group)
                self._overrides.append((name, group))
        self.instances_path = instances_path
        self._base = os.path.join(instances_path, "_base")
        self._context = user_context(token)
        self._instances = {}
        self._driver = self._new_driver()

    # -- what the host does to instances

    def do_boot(self, *, uuid: str, image_id: str, disk_format: str = "raw", **sizes: int) -> dict[str, Any]:
        """Make the disks of a new instance, as LibvirtDriver.spawn does; `sizes`: root_gb, ephemeral_gb, swap_mb."""
        return self._create_image(self._new_instance(uuid, image_id, disk_format, **({"root_gb": 1} | sizes)))

    def do_rescue(self, *, uuid: str, image_id: str) -> dict[str, Any]:
        """Make the rescue disk from `image_id`, as LibvirtDriver.rescue does."""
        instance = self._instances[uuid]
        disk_info = blockinfo.get_disk_info("qemu", instance, instance.image_meta, rescue=True)
        images = {"image_id": image_id, "kernel_id": None, "ramdisk_id": None}
        self._driver._create_image(self._context, instance, disk_info["mapping"], suffix=".rescue", disk_images=images)
        return self._outcome(instance)

    def do_unshelve(self, *, uuid: str, image_id: str, snapshot_id: str, root_gb: int = 1) -> dict[str, Any]:
        """Spawn from a shelved instance's snapshot and rebase the disk onto the original image."""
        instance = self._new_instance(uuid, snapshot_id, "qcow2", root_gb=root_gb)
        instance.system_metadata["image_base_image_ref"] = image_id
        instance.vm_state = vm_states.SHELVED_OFFLOADED
        return self._create_image(instance)

    def do_hard_reboot(self, *, uuid: str) -> dict[str, Any]:
        """Look after the disks as LibvirtDriver._hard_reboot does before it starts the domain again."""
        instance = self._instances[uuid]
        config = self._driver._host.get_guest(instance).get_config()
        disk_info = self._driver._get_instance_disk_info_from_config(config, None)
        self._driver._create_images_and_backing(self._context, instance, self._folder(instance), disk_info)
        return self._outcome(instance)

    def do_snapshot(self, *, uuid: str, name: str) -> dict[str, Any]:
        """Snapshot a shut-off instance into Glance by LibvirtDriver.snapshot; give the new image's id."""
        record = {"name": name, "disk_format": "qcow2", "container_format": "bare", "properties": {}}
        image = self._driver._image_api.create(self._context, record)
        states: list[str] = []

        def update_task_state(task_state: str, expected_state: str | None = None) -> None:
            states.append(task_state)

        self._driver.snapshot(self._context, self._instances[uuid], image["id"], update_task_state)
        return {"snapshot_id": image["id"], "task_states": states}

    # -- what the host does to its cache

    def do_precache(self, *, image_ids: list[str]) -> dict[str, bool]:
        """Cache images by request (`openstack aggregate cache image`): True where nova downloaded."""
        return {image_id: self._driver.cache_image(self._context, image_id) for image_id in image_ids}

    def do_manage_image_cache(self, *, uuids: list[str]) -> dict[str, Any]:
        """Run one pass of the image cache manager, with the instances of `uuids` as all there are."""
        instances = [self._instances[uuid] for uuid in uuids]
        mappings = {instance.uuid: block_device_mappings(instance) for instance in instances}

        def bdms_by_instance_uuid(context: object, uuids: list[str]) -> dict[str, objects.BlockDeviceMappingList]:
            return mappings

        objects.BlockDeviceMappingList.bdms_by_instance_uuid = staticmethod(bdms_by_instance_uuid)
        self._driver.manage_image_cache(self._context, instances)
        manager = self._driver.image_cache_manager
        return {
            "active": sorted({os.path.basename(path) for path in manager.active_base_files}),
            "removable": sorted(os.path.basename(path) for path in manager.removable_base_files),
            "disk_usage": manager.get_disk_usage(),
        }

    def do_look(self, *, name: str) -> dict[str, Any]:
        """Say what the listing of `_base` and the file `name` in it are to this user; `errno` where stat fails."""
        try:
            found = os.stat(os.path.join(self._base, name))
        except OSError as exc:
            return {"listing": sorted(os.listdir(self._base)), "errno": exc.errno}
        return {
            "listing": sorted(os.listdir(self._base)),
            "size": found.st_size,
            "mode": found.st_mode,
            "mtime": found.st_mtime,
            "local_bytes": found.st_blocks * 512,
        }

    # -- parts

    def _new_driver(self) -> libvirt_driver.LibvirtDriver:
        """Give a LibvirtDriver with what its disk code uses; its constructor wants libvirt's Python binding."""
        driver = libvirt_driver.LibvirtDriver.__new__(libvirt_driver.LibvirtDriver)
        driver.image_backend = imagebackend.Backend(CONF.use_cow_images)
        driver.image_cache_manager = imagecache.ImageCacheManager()
        driver._image_api = glance.API()
        driver._remotefs = remotefs.RemoteFilesystem()
        driver._host = Host(self._domain_xml)
        return driver

    def _new_instance(self, uuid: str, image_id: str, disk_format: str, **sizes: int) -> objects.Instance:
        number = len(self._instances) + 1
        instance = new_instance(
            self._context, uuid=uuid, image_id=image_id, disk_format=disk_format, number=number, **sizes
        )
        self._instances[uuid] = instance
        return instance

    def _create_image(self, instance: objects.Instance) -> dict[str, Any]:
        disk_info = blockinfo.get_disk_info("qemu", instance, instance.image_meta)
        self._driver._create_image(self._context, instance, disk_info["mapping"])
        return self._outcome(instance)

    def _folder(self, instance: objects.Instance) -> str:
        assert self.instances_path is not None
        return os.path.join(self.instances_path, instance.uuid)

    def _domain_xml(self, instance: objects.Instance) -> str:
        disks = {name: disk for name, disk in self._disks(instance).items() if name in DEVICES}
        return domain_xml(instance.name, instance.uuid, disks)

    def _outcome(self, instance: objects.Instance) -> dict[str, Any]:
        """Say what lies in the instance's folder and in `_base`."""
        base_name = hashlib.sha1(instance.image_ref.encode(), usedforsecurity=False).hexdigest()
        return {
            "base_name": base_name,
            "base_listing": sorted(os.listdir(self._base)),
            "disks": self._disks(instance),
        }

    def _disks(self, instance: objects.Instance) -> dict[str, dict[str, Any]]:
        folder = self._folder(instance)
        names = (name for name in sorted(os.listdir(folder)) if name.removesuffix(".rescue") in DEVICES)
        return {name: _disk(os.path.join(folder, name)) for name in names}


def _disk(path: str) -> dict[str, Any]:
    """Say what qemu-img says about a disk; it opens the overlay only, not its base."""
    argv = ["qemu-img", "info", "--force-share", "--output=json", path]
    info = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return {
        "path": path,
        "format": info["format"],
        "virtual_size": info["virtual-size"],
        "cluster_size": info.get("cluster-size"),
        "backing_file": info.get("backing-filename"),
        "backing_format": info.get("backing-filename-format"),
    }

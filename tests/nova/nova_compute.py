"""The commands of `nova_driver.py`: what a nova-compute does to `_base`, by nova's own LibvirtDriver.

Real: LibvirtDriver with its imagebackend, imagecache, blockinfo, images, GlanceImageServiceV2, glanceclient, privsep. Stood in for:
the database (instances are objects made here; block device mappings are handed over), libvirt (a shut-off guest that has the
domain XML nova would have written).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from typing import Any

import nova.conf
import nova.context
from nova import config as nova_config
from nova import objects, version
from nova.compute import power_state, vm_states
from nova.image import glance
from nova.virt.libvirt import blockinfo, imagebackend, imagecache
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt.volume import remotefs

CONF = nova.conf.CONF
HOST = "compute-of-the-test"

_DOMAIN_XML = """<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='KiB'>65536</memory>
<vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os><devices>{disks}</devices></domain>"""
_DISK_XML = """<disk type='file' device='disk'><driver name='qemu' type='{format}' cache='none'/>
<source file='{path}'/><target dev='{device}' bus='virtio'/></disk>"""


def prepare_nova() -> None:
    """Do what nova-compute's start does to the process: options parsed, objects registered."""
    nova_config.parse_args(["nova-compute"], default_config_files=[])
    objects.register_all()
    CONF.set_override("host", HOST)
    CONF.set_override("virt_type", "qemu", group="libvirt")
    CONF.set_override("default_ephemeral_format", "ext4")


class _ShutOffGuest:
    """What LibvirtDriver.snapshot asks of a guest that is shut off."""

    def __init__(self, xml: str) -> None:
        self._xml = xml

    def get_config(self) -> vconfig.LibvirtConfigGuest:
        parsed = vconfig.LibvirtConfigGuest()
        parsed.parse_str(self._xml)
        return parsed

    def get_power_state(self, host: Any) -> int:
        return power_state.SHUTDOWN


class _Host:
    """The libvirt connection: it knows the guests of `compute`, all shut off."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def get_guest(self, instance: objects.Instance) -> _ShutOffGuest:
        return _ShutOffGuest(self._compute.domain_xml(instance))

    def has_min_version(self, *args: Any, **kwargs: Any) -> bool:
        return True


class Compute:
    """One compute node; every ``do_`` method is a command, its arguments are the command's."""

    def __init__(self) -> None:
        self.instances_path: str | None = None
        self._instances: dict[str, objects.Instance] = {}

    def version(self) -> str:
        """Give nova's version."""
        return version.version_string()

    def do_configure(
        self,
        *,
        instances_path: str,
        glance_url: str,
        token: str,
        images_type: str = "default",
        options: dict[str, dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Be another compute node: its folders, its Glance, the user's token, ``options[group][name]``."""
        self.instances_path = instances_path
        self._base = os.path.join(instances_path, "_base")
        CONF.clear_override("remove_unused_original_minimum_age_seconds", group="image_cache")
        CONF.clear_override("snapshot_image_format", group="libvirt")
        CONF.set_override("instances_path", instances_path)
        CONF.set_override("lock_path", os.path.join(instances_path, "locks"), group="oslo_concurrency")
        CONF.set_override("api_servers", [glance_url], group="glance")
        CONF.set_override("images_type", images_type, group="libvirt")
        for group, values in (options or {}).items():
            for name, value in values.items():
                CONF.set_override(name, value, group=None if group == "DEFAULT" else group)
        user, project, roles = token.split(":")
        self._context = nova.context.RequestContext(
            user_id=user, project_id=project, auth_token=token, roles=roles.split(","), service_catalog=[]
        )
        self._instances = {}
        self._driver = self._new_driver()
        return {"version": self.version()}

    # -- what the host does to instances

    def do_boot(
        self,
        *,
        uuid: str,
        image_id: str,
        disk_format: str = "raw",
        root_gb: int = 1,
        ephemeral_gb: int = 0,
        swap_mb: int = 0,
    ) -> dict[str, Any]:
        """Make the disks of a new instance, as LibvirtDriver.spawn does."""
        instance = self._new_instance(uuid, image_id, disk_format, root_gb, ephemeral_gb, swap_mb)
        return self._create_image(instance)

    def do_rescue(self, *, uuid: str, image_id: str) -> dict[str, Any]:
        """Make the rescue disk from `image_id`, as LibvirtDriver.rescue does."""
        instance = self._instances[uuid]
        disk_info = blockinfo.get_disk_info("qemu", instance, instance.image_meta, rescue=True)
        images = {"image_id": image_id, "kernel_id": None, "ramdisk_id": None}
        self._driver._create_image(self._context, instance, disk_info["mapping"], suffix=".rescue", disk_images=images)
        return self._outcome(instance)

    def do_unshelve(self, *, uuid: str, image_id: str, snapshot_id: str, root_gb: int = 1) -> dict[str, Any]:
        """Spawn from a shelved instance's snapshot and rebase the disk onto the original image."""
        instance = self._new_instance(uuid, snapshot_id, "qcow2", root_gb, 0, 0)
        instance.system_metadata["image_base_image_ref"] = image_id
        instance.vm_state = vm_states.SHELVED_OFFLOADED
        return self._create_image(instance)

    def do_hard_reboot(self, *, uuid: str) -> dict[str, Any]:
        """Look after the disks as LibvirtDriver._hard_reboot does before it starts the domain again."""
        instance = self._instances[uuid]
        guest = self._driver._host.get_guest(instance)
        disk_info = self._driver._get_instance_disk_info_from_config(guest.get_config(), None)
        self._driver._create_images_and_backing(self._context, instance, self._instance_dir(instance), disk_info)
        return self._outcome(instance) | {"disk_info": disk_info}

    def do_snapshot(self, *, uuid: str, name: str) -> dict[str, Any]:
        """Snapshot a shut-off instance into Glance by LibvirtDriver.snapshot; give the new image's id."""
        instance = self._instances[uuid]
        image = self._driver._image_api.create(
            self._context,
            {"name": name, "disk_format": "qcow2", "container_format": "bare", "properties": {}},
        )
        states: list[str] = []
        self._driver.snapshot(
            self._context, instance, image["id"], lambda task_state, expected_state=None: states.append(task_state)
        )
        return {"snapshot_id": image["id"], "task_states": states}

    # -- what the host does to its cache

    def do_precache(self, *, image_ids: list[str]) -> dict[str, bool]:
        """Cache images by request (`openstack aggregate cache image`): True where nova downloaded."""
        return {image_id: self._driver.cache_image(self._context, image_id) for image_id in image_ids}

    def do_manage_image_cache(self, *, uuids: list[str]) -> dict[str, Any]:
        """One pass of the image cache manager, with the instances of `uuids` as all there are."""
        instances = [self._instances[uuid] for uuid in uuids]
        mappings = {instance.uuid: self._block_device_mappings(instance) for instance in instances}
        objects.BlockDeviceMappingList.bdms_by_instance_uuid = staticmethod(lambda context, uuids: mappings)
        self._driver.manage_image_cache(self._context, instances)
        manager = self._driver.image_cache_manager
        return {
            "active": sorted(os.path.basename(path) for path in manager.active_base_files),
            "removable": sorted(os.path.basename(path) for path in manager.removable_base_files),
            "disk_usage": manager.get_disk_usage(),
        }

    def do_look(self, *, name: str) -> dict[str, Any]:
        """Say what `_base`/`name` and the listing are to this user, without nova."""
        path = os.path.join(self._base, name)
        try:
            found = os.stat(path)
        except OSError as exc:
            return {"listing": sorted(os.listdir(self._base)), "errno": exc.errno}
        return {
            "listing": sorted(os.listdir(self._base)),
            "size": found.st_size,
            "mode": found.st_mode,
            "uid": found.st_uid,
            "mtime": found.st_mtime,
            "blocks": found.st_blocks,
        }

    # -- parts

    def _new_driver(self) -> libvirt_driver.LibvirtDriver:
        """Give a LibvirtDriver with what its disk code uses; its own constructor wants libvirt's Python binding."""
        driver = libvirt_driver.LibvirtDriver.__new__(libvirt_driver.LibvirtDriver)
        driver.image_backend = imagebackend.Backend(CONF.use_cow_images)
        driver.image_cache_manager = imagecache.ImageCacheManager()
        driver._image_api = glance.API()
        driver._remotefs = remotefs.RemoteFilesystem()
        driver._host = _Host(self)
        return driver

    def _new_instance(
        self, uuid: str, image_id: str, disk_format: str, root_gb: int, ephemeral_gb: int, swap_mb: int
    ) -> objects.Instance:
        flavor = objects.Flavor(
            id=1, name="test", flavorid="1", memory_mb=64, vcpus=1, root_gb=root_gb, ephemeral_gb=ephemeral_gb,
            swap=swap_mb, extra_specs={},
        )  # fmt: skip
        instance = objects.Instance(
            self._context, id=len(self._instances) + 1, uuid=uuid, project_id=self._context.project_id,
            user_id=self._context.user_id, image_ref=image_id, kernel_id="", ramdisk_id="", flavor=flavor,
            old_flavor=None, new_flavor=None, os_type=None, vm_mode=None, task_state=None, vm_state=vm_states.BUILDING,
            host=HOST, node=HOST, trusted_certs=None, migration_context=None, config_drive="", ephemeral_gb=ephemeral_gb,
            root_gb=root_gb, architecture="x86_64", hostname="guest", display_name="guest", numa_topology=None,
            metadata={}, ephemeral_key_uuid=None,
            system_metadata={
                "image_base_image_ref": image_id, "image_disk_format": disk_format, "image_container_format": "bare",
                "image_min_disk": str(root_gb), "image_min_ram": "0",
            },
        )  # fmt: skip
        self._instances[uuid] = instance
        return instance

    def _create_image(self, instance: objects.Instance) -> dict[str, Any]:
        disk_info = blockinfo.get_disk_info("qemu", instance, instance.image_meta)
        self._driver._create_image(self._context, instance, disk_info["mapping"])
        return self._outcome(instance)

    def _instance_dir(self, instance: objects.Instance) -> str:
        assert self.instances_path is not None
        return os.path.join(self.instances_path, instance.uuid)

    def domain_xml(self, instance: objects.Instance) -> str:
        """Give the domain as nova writes it: one file disk for each disk in the instance's folder."""
        names = [name for name in sorted(os.listdir(self._instance_dir(instance))) if name in _DEVICES]
        info = {name: self._disk_info(os.path.join(self._instance_dir(instance), name)) for name in names}
        disks = "".join(
            _DISK_XML.format(
                format=info[name]["format"],
                path=os.path.join(self._instance_dir(instance), name),
                device=_DEVICES[name],
            )
            for name in names
        )
        return _DOMAIN_XML.format(name=instance.name, uuid=instance.uuid, disks=disks)

    def _block_device_mappings(self, instance: objects.Instance) -> objects.BlockDeviceMappingList:
        blank = {"source_type": "blank", "destination_type": "local", "boot_index": -1, "instance_uuid": instance.uuid,
                 "disk_bus": None, "delete_on_termination": True, "no_device": False, "encrypted": False,
                 "encryption_secret_uuid": None, "encryption_format": None, "encryption_options": None,
                 "device_type": "disk", "device_name": None}  # fmt: skip
        made = []
        if instance.flavor.swap:
            made.append(objects.BlockDeviceMapping(guest_format="swap", volume_size=instance.flavor.swap, **blank))
        if instance.flavor.ephemeral_gb:
            made.append(
                objects.BlockDeviceMapping(guest_format=None, volume_size=instance.flavor.ephemeral_gb, **blank)
            )
        return objects.BlockDeviceMappingList(objects=made)

    def _outcome(self, instance: objects.Instance) -> dict[str, Any]:
        """Say what lies in the instance's folder and under its image's name."""
        folder = self._instance_dir(instance)
        base_name = hashlib.sha1(instance.image_ref.encode()).hexdigest()  # noqa: S324
        return {
            "base_name": base_name,
            "base_listing": sorted(os.listdir(self._base)),
            "disks": {
                name: self._disk_info(os.path.join(folder, name))
                for name in sorted(os.listdir(folder))
                if name.removesuffix(".rescue") in _DEVICES
            },
        }

    @staticmethod
    def _disk_info(path: str) -> dict[str, Any]:
        output = subprocess.run(
            ["qemu-img", "info", "--force-share", "--output=json", path], check=True, capture_output=True
        ).stdout
        info = json.loads(output)
        return {
            "path": path,
            "format": info["format"],
            "virtual_size": info["virtual-size"],
            "backing_file": info.get("backing-filename"),
            "backing_format": info.get("backing-filename-format"),
            "cluster_size": info.get("cluster-size"),
        }


_DEVICES = {"disk": "vda", "disk.local": "vdb", "disk.eph0": "vdb", "disk.swap": "vdc"}

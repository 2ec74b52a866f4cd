"""What `nova_compute.py` hands to nova's driver in place of the database and of libvirt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nova.context
from nova import objects
from nova.compute import power_state, vm_states
from nova.virt.libvirt import config as vconfig

HOST = "compute-of-the-test"
DEVICES = {"disk": "vda", "disk.local": "vdb", "disk.swap": "vdc"}
"""Names of disks in an instance's folder, and where nova attaches them."""

_DOMAIN_XML = """<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='KiB'>65536</memory>
<vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os><devices>{disks}</devices></domain>"""
_DISK_XML = """<disk type='file' device='disk'><driver name='qemu' type='{format}' cache='none'/>
<source file='{path}'/><target dev='{device}' bus='virtio'/></disk>"""

_BLANK_MAPPING = {
    "source_type": "blank",
    "destination_type": "local",
    "boot_index": -1,
    "disk_bus": None,
    "device_type": "disk",
    "device_name": None,
    "delete_on_termination": True,
    "no_device": False,
    "encrypted": False,
    "encryption_secret_uuid": None,
    "encryption_format": None,
    "encryption_options": None,
}


def user_context(token: str) -> nova.context.RequestContext:
    """Give the context of a request made with this token ("user:project:role,role")."""
    user, project, roles = token.split(":")
    return nova.context.RequestContext(
        user_id=user, project_id=project, auth_token=token, roles=roles.split(","), service_catalog=[]
    )


def new_instance(
    context: nova.context.RequestContext,
    *,
    uuid: str,
    image_id: str,
    disk_format: str,
    root_gb: int,
    ephemeral_gb: int = 0,
    swap_mb: int = 0,
    number: int = 1,
) -> objects.Instance:
    """Give an instance as nova-api hands it to nova-compute; no kernel and no ramdisk are empty strings there."""
    flavor = objects.Flavor(
        id=1,
        name="test",
        flavorid="1",
        memory_mb=64,
        vcpus=1,
        root_gb=root_gb,
        ephemeral_gb=ephemeral_gb,
        swap=swap_mb,
        extra_specs={},
    )
    names = ("old_flavor", "new_flavor", "os_type", "vm_mode", "task_state", "trusted_certs", "migration_context")
    return objects.Instance(
        context,
        id=number,
        uuid=uuid,
        project_id=context.project_id,
        user_id=context.user_id,
        image_ref=image_id,
        kernel_id="",
        ramdisk_id="",
        flavor=flavor,
        vm_state=vm_states.BUILDING,
        host=HOST,
        node=HOST,
        config_drive="",
        root_gb=root_gb,
        ephemeral_gb=ephemeral_gb,
        architecture="x86_64",
        hostname="guest",
        display_name="guest",
        numa_topology=None,
        ephemeral_key_uuid=None,
        metadata={},
        system_metadata={
            "image_base_image_ref": image_id,
            "image_disk_format": disk_format,
            "image_container_format": "bare",
            "image_min_disk": str(root_gb),
            "image_min_ram": "0",
        },
        **dict.fromkeys(names),
    )


def block_device_mappings(instance: objects.Instance) -> objects.BlockDeviceMappingList:
    """Give the mappings nova-api made for the flavor's swap and ephemeral disk."""
    wanted = [("swap", instance.flavor.swap), (None, instance.flavor.ephemeral_gb)]
    return objects.BlockDeviceMappingList(
        objects=[
            objects.BlockDeviceMapping(
                instance_uuid=instance.uuid, guest_format=guest_format, volume_size=size, **_BLANK_MAPPING
            )
            for guest_format, size in wanted
            if size
        ]
    )


def domain_xml(name: str, uuid: str, disks: dict[str, dict[str, Any]]) -> str:
    """Give the domain as nova writes it, with `disks` by their names in DEVICES."""
    parts = (
        _DISK_XML.format(format=disk["format"], path=disk["path"], device=DEVICES[disk_name])
        for disk_name, disk in disks.items()
    )
    return _DOMAIN_XML.format(name=name, uuid=uuid, disks="".join(parts))


class ShutOffGuest:
    """What LibvirtDriver asks of a guest that is shut off."""

    def __init__(self, xml: str) -> None:
        self._xml = xml

    def get_config(self) -> vconfig.LibvirtConfigGuest:
        """Give the parsed domain XML."""
        parsed = vconfig.LibvirtConfigGuest()
        parsed.parse_str(self._xml)
        return parsed

    def get_power_state(self, host: Host) -> int:
        """Give nova's word for shut off."""
        return power_state.SHUTDOWN


class Host:
    """The libvirt connection of a host where every guest is shut off."""

    def __init__(self, xml_of: Callable[[objects.Instance], str]) -> None:
        self._xml_of = xml_of

    def get_guest(self, instance: objects.Instance) -> ShutOffGuest:
        """Give the instance's guest."""
        return ShutOffGuest(self._xml_of(instance))

    def has_min_version(self, **versions: Any) -> bool:
        """Say that libvirt and qemu are new enough."""
        return True

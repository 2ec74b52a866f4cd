"""A Cinder volume driver for a machine that has nothing but files and loop devices.

Runs inside `.venvs/glance`, in cinder-volume, as root. A volume is a sparse file; an attachment is a loop device of
this host, handed out as `local`. One device a volume and mode: an attachment with mode `ro` gets a read-only device.
"""

import json
import os
import subprocess
from typing import Any

from cinder import coordination, interface
from cinder.image import image_utils
from cinder.volume import configuration, driver, volume_utils
from oslo_config import cfg

GIB = 1 << 30
OPTIONS = [cfg.StrOpt("loop_directory", help="Where the volumes' files are")]
cfg.CONF.register_opts(OPTIONS, group=configuration.SHARED_CONF_GROUP)


def run(*argv: str) -> str:
    """Return what the command wrote; CalledProcessError when it fails."""
    return subprocess.run(
        argv, check=True, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout


def devices(path: str) -> list[tuple[str, bool]]:
    """Return (device, whether it is read-only) of the file's loop devices, but for those that go with their last user.

    `losetup -d` of an open device only marks it so: to hand it out again would be to hand out what vanishes.
    """
    out = run("losetup", "--json", "--list", "-O", "NAME,RO,AUTOCLEAR", "-j", path)
    found = json.loads(out)["loopdevices"] if out.strip() else []
    return [(one["name"], bool(int(one["ro"]))) for one in found if not int(one["autoclear"])]


def is_read_only(connector: dict[str, Any] | None) -> bool:
    return (connector or {}).get("mode") == "ro"


@interface.volumedriver
class LoopFileDriver(driver.VolumeDriver):  # type: ignore[misc] # cinder has no types
    """Create, delete, clone, snapshot, extend, from and to an image, attach ro and rw, multiattach."""

    VERSION = "1.0"
    CI_WIKI_NAME = "none"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values(OPTIONS)
        self.directory = self.configuration.loop_directory

    @staticmethod
    def get_driver_options() -> list[Any]:
        return OPTIONS

    def do_setup(self, context: Any) -> None:  # noqa: ARG002 (cinder's signature, here and below)
        os.makedirs(self.directory, exist_ok=True)

    def check_for_setup_error(self) -> None:
        run("losetup", "--version")

    def local_path(self, volume: Any) -> str:
        """Return the file of a volume or snapshot."""
        return str(os.path.join(self.directory, volume.name))

    def _resize(self, volume: Any, size_gib: int | None = None) -> None:
        with open(self.local_path(volume), "ab") as file:
            file.truncate((size_gib or volume.size) * GIB)

    def _copy(self, source: Any, target: Any) -> None:
        run("cp", "--sparse=always", "--reflink=auto", self.local_path(source), self.local_path(target))

    def _remove(self, volume: Any) -> None:
        path = self.local_path(volume)
        if os.path.exists(path):
            for device, _ in devices(path):
                run("losetup", "-d", device)
            os.unlink(path)

    def create_volume(self, volume: Any) -> None:
        self._resize(volume)

    def delete_volume(self, volume: Any) -> None:
        self._remove(volume)

    def create_cloned_volume(self, volume: Any, src_vref: Any) -> None:
        self._copy(src_vref, volume)
        self._resize(volume)

    def create_snapshot(self, snapshot: Any) -> None:
        self._copy(snapshot.volume, snapshot)

    def delete_snapshot(self, snapshot: Any) -> None:
        self._remove(snapshot)

    def create_volume_from_snapshot(self, volume: Any, snapshot: Any) -> None:
        self._copy(snapshot, volume)
        self._resize(volume)

    def extend_volume(self, volume: Any, new_size: int) -> None:
        self._resize(volume, new_size)
        for device, _ in devices(self.local_path(volume)):
            run("losetup", "-c", device)

    def copy_image_to_volume(
        self, context: Any, volume: Any, image_service: Any, image_id: str, disable_sparse: bool = False
    ) -> None:
        path = self.local_path(volume)
        image_utils.fetch_to_raw(
            context,
            image_service,
            image_id,
            path,
            "1M",
            size=volume.size,
            run_as_root=False,
            disable_sparse=disable_sparse,
        )
        self._resize(volume)

    def copy_volume_to_image(self, context: Any, volume: Any, image_service: Any, image_meta: Any) -> None:
        path = self.local_path(volume)
        volume_utils.upload_volume(context, image_service, image_meta, path, volume, run_as_root=False)

    def create_export(self, context: Any, volume: Any, connector: Any) -> None:
        """Nothing to do: there is no target to log in to."""

    def ensure_export(self, context: Any, volume: Any) -> None:
        """As create_export."""

    def remove_export(self, context: Any, volume: Any) -> None:
        """As create_export."""

    @coordination.synchronized("loop-{volume.id}")  # type: ignore[untyped-decorator] # cinder has no types
    def initialize_connection(self, volume: Any, connector: Any, **_: Any) -> dict[str, Any]:
        path, wanted = self.local_path(volume), is_read_only(connector)
        device = next((name for name, read_only in devices(path) if read_only == wanted), None)
        if device is None:
            device = run("losetup", "--find", "--show", *(["-r"] if wanted else []), path).strip()
        return {"driver_volume_type": "local", "data": {"device_path": device, "volume_id": volume.id}}

    @coordination.synchronized("loop-{volume.id}")  # type: ignore[untyped-decorator] # cinder has no types
    def terminate_connection(self, volume: Any, connector: Any, **_: Any) -> bool:
        """Take the device away with its last attachment; True when another uses it."""
        mode = is_read_only(connector)
        same = [one for one in volume.volume_attachment if one.connector and is_read_only(one.connector) == mode]
        if connector and len(same) > 1:  # the one that goes is still among them
            return True
        for device, read_only in devices(self.local_path(volume)):
            if not connector or read_only == mode:
                run("losetup", "-d", device)
        return False

    def _update_volume_stats(self) -> None:
        space = os.statvfs(self.directory)
        self._stats = {
            "volume_backend_name": self.configuration.safe_get("volume_backend_name"),
            "vendor_name": "rig",
            "driver_version": self.VERSION,
            "storage_protocol": "local",
            "multiattach": True,
            "total_capacity_gb": space.f_blocks * space.f_frsize / GIB,
            "free_capacity_gb": space.f_bavail * space.f_frsize / GIB,
            "reserved_percentage": 0,
            "thin_provisioning_support": True,
            "thick_provisioning_support": False,
            "max_over_subscription_ratio": 1000.0,
            "provisioned_capacity_gb": 0,
            "sparse_copy_volume": True,
            "filter_function": self.get_filter_function(),
            "goodness_function": self.get_goodness_function(),
        }

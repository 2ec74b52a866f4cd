"""A compute node for nova's code: nova as a process of an unprivileged user, and basefs mounted on its `_base`."""

import contextlib
import os
import pwd
import random
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from basefs.control.client import ControlClient
from tests.conftest import LOG_LINE
from tests.nova.nova_node import Answer, NovaNode, nova_node
from tools.mount import BasefsMount, base_name
from tools.rig import Rig

NOVA_USER = "nobody"  # tools/mount.py's nova_user
NOVA_USER_OF_GLANCE = "u1"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Site:
    """One compute node and its Glance."""

    node: NovaNode
    instances_path: Path
    rig: Rig

    @property
    def base(self) -> Path:
        """nova's image cache directory."""
        return self.instances_path / "_base"

    def configure(self, **options: dict[str, Any]) -> None:
        """Start nova anew on this node; ``libvirt={"images_type": "raw"}`` is nova.conf."""
        self.node.configure(
            instances_path=str(self.instances_path),
            glance_url=self.rig.glance_url,
            token=self.rig.token(NOVA_USER_OF_GLANCE),
            options=options,
        )

    def upload(self, source: Path, disk_format: str = "raw") -> str:
        """Make an image of a file, as nova's user; returns its id."""
        return self.rig.api(NOVA_USER_OF_GLANCE).upload(source, source.name, disk_format)

    def boot(self, image_id: str, **arguments: Any) -> tuple[str, Answer]:
        """Make the disks of a new instance; returns its uuid and what nova did."""
        instance = str(uuid.uuid4())
        return instance, self.node.boot(uuid=instance, image_id=image_id, **arguments)

    def disk(self, instance: str, name: str = "disk") -> Path:
        """Where a disk of the instance is."""
        return self.instances_path / instance / name

    def path(self, image_id: str) -> Path:
        """Where nova looks for the image."""
        return self.base / base_name(image_id)


@dataclass(frozen=True, slots=True)
class MountedSite(Site):
    """A compute node with basefs on its `_base`; asked over its socket, as a command takes a second to start."""

    mount: BasefsMount

    @property
    def control(self) -> ControlClient:
        """What the commands `basefs status` and `basefs image` use."""
        return ControlClient(self.mount.directory / "control.sock")


@pytest.fixture(scope="session", params=["nova34", "nova31"])
def nova(request: pytest.FixtureRequest) -> Iterator[NovaNode]:
    """A nova of each release, for the session: 34 with native threads, 31 under eventlet, as they run by default."""
    with nova_node(request.param, NOVA_USER) as node:
        yield node


@pytest.fixture(scope="module")
def shared_mount(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    """One basefs for the tests that leave each other's images alone; it must not have warned of anything."""
    mount = BasefsMount(tmp_path_factory.mktemp("nova") / "basefs", rig.conf_lines())
    give_to_nova(mount)
    with mount:
        yield mount
    warned = [line for line in mount.log_text.splitlines() if LOG_LINE.match(line)]
    assert not warned, warned


@pytest.fixture
def site(nova: NovaNode, shared_mount: BasefsMount, rig: Rig) -> MountedSite:
    """A nova, freshly configured, on the mount that all tests share."""
    mounted = MountedSite(nova, shared_mount.instances_path, rig, shared_mount)
    mounted.configure()
    return mounted


def mounted_site(node: NovaNode, mount: BasefsMount, rig: Rig) -> MountedSite:
    """Mount, and start nova anew on the mount."""
    give_to_nova(mount)
    mount.start()
    mounted = MountedSite(node, mount.instances_path, rig, mount)
    mounted.configure()
    return mounted


@pytest.fixture
def plain_site(nova: NovaNode, rig: Rig, tmp_path: Path) -> Site:
    """A nova, freshly configured, without basefs: what it does by itself is what it must do on the mount."""
    instances = tmp_path / "plain"
    (instances / "_base").mkdir(parents=True)
    _chown(instances, instances / "_base")
    plain = Site(nova, instances, rig)
    plain.configure()
    return plain


@contextlib.contextmanager
def lower_directory(site: MountedSite, tmp_path: Path) -> Iterator[Path]:
    """What lies below the mount: a bind mount of the folder above leaves the mount out."""
    peephole = tmp_path / "below"
    peephole.mkdir()
    subprocess.run(["mount", "--bind", str(site.instances_path), str(peephole)], check=True)
    try:
        yield peephole / "_base"
    finally:
        subprocess.run(["umount", str(peephole)], check=True)


def give_to_nova(mount: BasefsMount) -> None:
    """Make the folders nova writes to nova's, as on a compute node; before mounting."""
    _chown(mount.instances_path, mount.mountpoint)


def _chown(*paths: Path) -> None:
    entry = pwd.getpwnam(NOVA_USER)
    for path in paths:
        os.chown(path, entry.pw_uid, entry.pw_gid)


@pytest.fixture(scope="session")
def raw_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest's disk of 24 MiB and a sector: data, a hole, data to the end."""
    path = tmp_path_factory.mktemp("images") / "guest.raw"
    noise = random.Random(34)
    with open(path, "wb") as disk:
        disk.write(noise.randbytes(5 * MIB))
        disk.seek(20 * MIB)
        disk.write(noise.randbytes(4 * MIB + 512))
    return path


@pytest.fixture(scope="session")
def qcow2_file(raw_file: Path) -> Path:
    """The same disk as qcow2."""
    return convert(raw_file, "qcow2")


@pytest.fixture(scope="session")
def vmdk_file(raw_file: Path) -> Path:
    """The same disk as a streamOptimized vmdk, which nova converts."""
    return convert(raw_file, "vmdk", "-o", "subformat=streamOptimized")


def convert(source: Path, disk_format: str, *options: str) -> Path:
    """Convert a raw file; the new one lies beside it."""
    target = source.with_suffix("." + disk_format)
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", disk_format, *options, str(source), str(target)], check=True
    )
    return target


def same_guest_bytes(original: Path, disk: Path, disk_format: str) -> bool:
    """Whether qemu reads from `disk` (and its bases) what `original`, a raw file, holds; zeros may follow."""
    argv = ["qemu-img", "compare", "-U", "-f", "raw", "-F", disk_format, str(original), str(disk)]
    return subprocess.run(argv, check=False, stdout=subprocess.DEVNULL).returncode == 0


def tool(name: str) -> str:
    """The path of an administrator's program, which an ordinary PATH may not have."""
    found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    assert found, f"{name} is not installed"
    return found

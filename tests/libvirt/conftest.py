"""A compute node in small: basefs over Glance as `_base`, a libvirtd, and instances on an image of 8 MiB."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.libvirt.boot_sector import BootableImage, bootable_image
from tests.libvirt.domain import Domain
from tests.libvirt.libvirtd import Libvirt, libvirtd
from tests.qemu.shared_mount import shared_mount
from tools.mount import BasefsMount
from tools.rig import Rig


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A bootable image as the mount shows it.

    Attributes:
        path: The file, outside libvirt's namespaces.
        image: What it is, byte for byte.
    """

    path: Path
    image: BootableImage


@pytest.fixture(scope="package")
def mount(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    """One mount for the folder: nothing here does harm to it."""
    with shared_mount(tmp_path_factory.mktemp("libvirt") / "basefs", rig, {"graduate": True}) as mounted:
        yield mounted


@pytest.fixture(scope="package")
def libvirt(mount: BasefsMount) -> Iterator[Libvirt]:
    """One libvirtd for the folder, its `_base` the mount."""
    with libvirtd(mount.instances_path) as running:
        yield running


@pytest.fixture(scope="package")
def image() -> BootableImage:
    """A disk whose size is a multiple of nothing."""
    return bootable_image(8 * 1024 * 1024 + 3 * 512 + 7, seed=1)


@pytest.fixture
def base(rig: Rig, mount: BasefsMount, image: BootableImage) -> Base:
    """A new, cold image."""
    image_id = rig.upload(image.content, "bootable")
    return Base(path=mount.path(image_id), image=image)


@pytest.fixture
def new_domain(libvirt: Libvirt, base: Base) -> Iterator[Callable[[], Domain]]:
    """Makes instances on `base`, defined and not started; they are gone after the test."""
    made: list[Domain] = []

    def make() -> Domain:
        domain = Domain(libvirt, uuid.uuid4(), base.path.name)
        made.append(domain)
        domain.create()
        return domain

    yield make
    for domain in made:
        domain.remove()


@pytest.fixture
def domain(new_domain: Callable[[], Domain]) -> Domain:
    """A running instance."""
    domain = new_domain()
    domain.virsh("start")
    return domain

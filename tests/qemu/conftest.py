"""A mount for the folder, and images made on the spot."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from tests.qemu.shared_mount import shared_mount
from tools.mount import BasefsMount
from tools.rig import Rig


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """An image on the mount beside the file it was uploaded from."""

    path: Path
    original: Path
    content: bytes = field(repr=False)


@pytest.fixture(scope="package")
def mount(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    """One mount for the folder: nothing here does harm to it."""
    with shared_mount(tmp_path_factory.mktemp("qemu") / "basefs", rig) as mounted:
        yield mounted


@pytest.fixture
def expose(rig: Rig, mount: BasefsMount, tmp_path: Path) -> Callable[..., Exposed]:
    """`expose(content or size, disk_format, container_format)`: a new, cold image; of random bytes for a size."""

    def make(content: bytes | int, disk_format: str = "raw", container_format: str = "bare") -> Exposed:
        if isinstance(content, int):
            content = Random(content).randbytes(content)
        image_id = rig.upload(content, "for-qemu", disk_format, container_format=container_format)
        original = tmp_path / image_id
        original.write_bytes(content)
        return Exposed(path=mount.path(image_id), original=original, content=content)

    return make

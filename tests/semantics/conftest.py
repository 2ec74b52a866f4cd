"""One mount over a real Glance for the folder, a pool of images that nobody has used, and ways to look at them."""

import errno
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.fakes.front import MisbehavingFront
from tests.qemu.shared_mount import LEVELS_NOT_EXPECTED, shared_mount
from tools.mount import BasefsMount, base_name
from tools.rig import Rig

IMAGE_BYTES = 3_000_001
"""More than the header that the checks bring (1 MiB), so an image that was looked up is not here as a whole."""
POOL_IMAGES = 90
NOVA = "nobody"
"""What BasefsMount takes for the nova user."""
_LOOK_EVERY_S = 0.01
_PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image, cold until a test uses it."""

    id: str
    mount: BasefsMount
    content: bytes = field(repr=False)

    @property
    def name(self) -> str:
        return base_name(self.id)

    @property
    def path(self) -> Path:
        return self.mount.path(self.id)

    def report(self) -> dict[str, Any]:
        """What basefs says of it now; asks Glance nothing and counts as no use."""
        return report(self.mount, self.id)

    def is_listed_for_nova(self) -> bool:
        return self.name in listing_as(NOVA, self.mount.mountpoint)


def report(mount: BasefsMount, image_id: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((mount.mountpoint / ".basefs" / "images" / f"{image_id}.json").read_text())
    return value


def status(mount: BasefsMount) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((mount.mountpoint / ".basefs" / "status.json").read_text())
    return value


def listing_as(user: str, directory: Path) -> list[str]:
    """`ls -A` by another user; from within, as the tests' directories are closed to others."""
    done = subprocess.run(["ls", "-A"], cwd=directory, user=user, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


def run_as(user: str, directory: Path, *command: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(command, cwd=directory, user=user, capture_output=True, check=False)


def eventually(condition: Callable[[], object], patience_s: float = _PATIENCE_S) -> None:
    """Return when the condition holds; what it is about has no event that a test could wait for."""
    deadline = time.monotonic() + patience_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {patience_s:g} s"
        pause.wait(_LOOK_EVERY_S)


def wait_for_images(mount: BasefsMount, count: int) -> None:
    eventually(lambda: status(mount)["images"] >= count)


@contextmanager
def front_mount(
    front: MisbehavingFront, directory: Path, options: Mapping[str, object], may_log: tuple[str, ...] = ()
) -> Iterator[BasefsMount]:
    """A mount over a front; it must end cleanly and complain of nothing but `may_log` (re.search)."""
    mount = BasefsMount(directory, front.conf_lines(), options)
    mount.start()
    try:
        wait_for_images(mount, len(front.glance.images))
        yield mount
    finally:
        mount.stop()
    complaints = [line for line in mount.log_text.splitlines() if LEVELS_NOT_EXPECTED.search(line)]
    assert [line for line in complaints if not any(re.search(pattern, line) for pattern in may_log)] == []


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """An open file descriptor."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def errno_of(call: Callable[[], object]) -> str | None:
    """The name of the errno that a call fails with; None if it does not."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return None


@pytest.fixture(scope="package")
def content() -> bytes:
    return Random(7).randbytes(IMAGE_BYTES)


@pytest.fixture(scope="package")
def pool(rig: Rig, content: bytes) -> Iterator[str]:
    """Ids of images with `content`, each given out once."""
    return iter(rig.clone(rig.upload(content, "semantics", "raw"), POOL_IMAGES))


@pytest.fixture(scope="package")
def lower_names() -> tuple[str, ...]:
    return ("ephemeral_1_40d1d2c", "swap_64", "notes.txt")


@pytest.fixture(scope="package")
def mount(
    rig: Rig, pool: Iterator[str], lower_names: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BasefsMount]:
    """One mount for the folder: nothing here does harm to it. Its lower directory had `lower_names` before."""
    directory = tmp_path_factory.mktemp("semantics") / "basefs"
    below = directory / "instances" / "_base"
    below.mkdir(parents=True)
    for name in lower_names:
        (below / name).write_text(f"{name} before the mount\n")
    (below / ".basefs").mkdir()
    (below / ".basefs" / "precious").write_text("an operator's\n")
    with shared_mount(directory, rig) as mounted:
        wait_for_images(mounted, POOL_IMAGES + 1)
        yield mounted


@pytest.fixture
def new_image(mount: BasefsMount, pool: Iterator[str], content: bytes) -> Callable[[], Image]:
    return lambda: Image(id=next(pool), mount=mount, content=content)


@pytest.fixture
def image(new_image: Callable[[], Image]) -> Image:
    """An image of the shared mount that no test has used."""
    return new_image()

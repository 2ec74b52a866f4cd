"""Many processes at once open, read, unlink, warm and evict the same images: no error, no wrong byte."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from basefs.control.client import ControlClient
from basefs.errors import ControlError
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import eventually, front_mount, opened, report, status
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

SIZES = (2_500_001, 1_200_000, 40_000)
THREADS = 8
ROUNDS = 120


@pytest.fixture
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        for size in SIZES:
            running.glance.add(Random(size).randbytes(size))
        yield running


@pytest.fixture
def mount(front: MisbehavingFront, tmp_path: Path) -> Iterator[BasefsMount]:
    with front_mount(front, tmp_path / "basefs", {"catalog_refresh_s": 3600}) as mounted:
        yield mounted


class Worker:
    """One process's worth of operations, in an order of its own."""

    def __init__(self, mount: BasefsMount, contents: dict[str, bytes], seed: int) -> None:
        self._mount = mount
        self._contents = contents
        self._rng = Random(seed)
        self._control = ControlClient(mount.directory / "control.sock")

    def work(self) -> None:
        for _ in range(ROUNDS):
            image_id = self._rng.choice(list(self._contents))
            path, content = self._mount.path(image_id), self._contents[image_id]
            operations: list[Callable[[], object]] = [
                lambda path=path, content=content: self.read(path, content, 0),
                lambda path=path, content=content: self.read(path, content, os.O_DIRECT),
                lambda path=path, content=content: self.read(path, content, os.O_DIRECT),
                path.stat,
                path.unlink,
                lambda path=path: os.utime(path),
                lambda image_id=image_id: self.evict(image_id),
                lambda image_id=image_id: self._control.start_warm(image_id),
                lambda: os.listdir(self._mount.mountpoint),
            ]
            self._rng.choice(operations)()

    def read(self, path: Path, content: bytes, flags: int) -> None:
        with opened(path, flags) as fd:
            for _ in range(3):
                offset, size = self._rng.randrange(len(content)), self._rng.randrange(1, 700_000)
                assert os.pread(fd, size, offset) == content[offset : offset + size]

    def evict(self, image_id: str) -> None:
        try:
            self._control.evict(image_id)
        except ControlError as error:
            if "open" not in str(error):
                raise


def test_nobody_sees_an_error_or_a_wrong_byte(front: MisbehavingFront, mount: BasefsMount) -> None:
    contents = dict(front.glance.data)
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(Worker(mount, contents, seed).work) for seed in range(THREADS)]:
            done.result()
    eventually(lambda: status(mount)["open_handles"] == 0)
    for image_id, content in contents.items():
        assert mount.path(image_id).read_bytes() == content
        mount.path(image_id).unlink()
        eventually(lambda image_id=image_id: report(mount, image_id)["cached_bytes"] == 0)
    assert list((mount.cache_dir / "chunks").iterdir()) == []

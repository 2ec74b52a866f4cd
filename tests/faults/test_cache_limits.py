"""Both limits of the cache over a real mount, with the cache on a small ext4 of its own."""

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from basefs.cache.overlays import FRESH_S
from tests.conftest import MountFactory
from tests.fakes.front import MisbehavingFront
from tests.faults.conftest import MIB
from tests.faults.readers import eventually, opened, pread, read_at
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

IMAGE_BYTES = 8 * MIB + 1
LIMIT = 32 * MIB
OPTIONS = {"fetch_request_bytes_max": MIB, "cache_min_free_bytes": 0, "cache_max_bytes": LIMIT}


def used(directory: Path) -> int:
    """What `du` says of the cache, and the chunks' directory itself."""
    total = 0
    for path in (*directory.glob("chunks/*"), *directory.glob("state.sqlite*")):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


class Sampler:
    """Looks as often as it can while the body runs; the worst that it saw."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._over = threading.Event()
        self.most_used = 0
        self.least_free = 1 << 62

    @contextmanager
    def sampling(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            disk = os.statvfs(self._cache_dir)
            self.least_free = min(self.least_free, disk.f_bavail * disk.f_frsize)
            self.most_used = max(self.most_used, used(self._cache_dir))


def read_at_random(mount: BasefsMount, images: dict[str, bytes], seed: int, reads: int) -> None:
    """Every byte is compared with the source's."""
    rng = random.Random(seed)
    for _ in range(reads):
        image_id, data = rng.choice(list(images.items()))
        offset = rng.randrange(len(data) // 4096) * 4096
        length = rng.choice((4096, 128 * 1024, MIB))
        assert read_at(mount.path(image_id), offset, length) == data[offset : offset + length]


def readers(mount: BasefsMount, images: dict[str, bytes], *, reads: int) -> None:
    """Eight of them at once."""
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(read_at_random, mount, images, seed, reads) for seed in range(8)]
        for each in done:
            each.result()


def make_images(front: MisbehavingFront, count: int) -> dict[str, bytes]:
    images = {}
    for n in range(count):
        data = random.Random(n).randbytes(IMAGE_BYTES)
        images[front.glance.add(data)] = data
    return images


def read_whole(mount: BasefsMount, image_id: str, data: bytes) -> None:
    with opened(mount.path(image_id)) as fd:
        for offset in range(0, len(data), MIB):
            assert pread(fd, offset, MIB) == data[offset : offset + MIB]


def test_cache_max_bytes_holds_at_every_moment_and_every_byte_is_right(
    front: MisbehavingFront, ext4: Path, basefs_mount: MountFactory
) -> None:
    images = make_images(front, 8)
    mount = basefs_mount(front.conf_lines(), {**OPTIONS, "cache_dir": ext4 / "cache"})
    mount.wait_for_images(8)
    sampler = Sampler(ext4 / "cache")
    with sampler.sampling():
        readers(mount, images, reads=8)
        mount.unmount()
        mount.start()
        readers(mount, images, reads=4)
    assert LIMIT // 2 < sampler.most_used <= LIMIT
    status = mount.status()
    assert status["cache_allocated_bytes"] <= LIMIT
    assert status["evicted_chunks"] > 0


def test_the_disk_keeps_its_free_space_whoever_fills_it(
    front: MisbehavingFront, ext4: Path, basefs_mount: MountFactory
) -> None:
    min_free = 40 * MIB
    images = make_images(front, 8)
    options = {**OPTIONS, "cache_dir": ext4 / "cache", "cache_max_bytes": 0, "cache_min_free_bytes": min_free}
    mount = basefs_mount(front.conf_lines(), options)
    mount.wait_for_images(8)
    sampler = Sampler(ext4 / "cache")
    with sampler.sampling():
        readers(mount, images, reads=10)
    assert sampler.least_free >= min_free - MIB, "less what the state database wrote meanwhile"
    assert mount.status()["evicted_chunks"] > 0
    ballast = ext4 / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 30 * MIB)

    def is_free() -> bool:
        disk = os.statvfs(ext4)
        return disk.f_bavail * disk.f_frsize >= min_free

    eventually(is_free)  # by eviction alone: nobody reads
    readers(mount, images, reads=2)


def test_images_in_use_outlast_those_that_are_not(
    front: MisbehavingFront, ext4: Path, basefs_mount: MountFactory
) -> None:
    images = make_images(front, 6)
    mount = basefs_mount(front.conf_lines(), {**OPTIONS, "cache_dir": ext4 / "cache"})
    mount.wait_for_images(6)
    (base, base_data), (pinned, pinned_data), *others = images.items()
    for image_id, data in ((base, base_data), (pinned, pinned_data)):
        read_whole(mount, image_id, data)
    overlay = mount.instances_path / "11111111-2222-3333-4444-555555555555" / "disk"
    overlay.parent.mkdir()
    backing = f"backing_file={mount.path(base)},backing_fmt=raw"
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", backing, str(overlay), "8M"], check=True)
    assert "pinned" in mount.cli("image", "pin", pinned).stdout
    threading.Event().wait(FRESH_S)  # what the evictor knows of overlays is so old at most
    for image_id, data in others:
        for offset in range(0, len(data), MIB):  # opened and closed: nobody has them open for long
            assert read_at(mount.path(image_id), offset, MIB) == data[offset : offset + MIB]
    assert mount.image(base)["cached_bytes"] == len(base_data)
    assert mount.image(pinned)["cached_bytes"] == len(pinned_data)
    assert mount.image(base)["in_use"] == f"base of {overlay.parent.name}/disk"
    assert mount.image(pinned)["in_use"] == "pinned"
    assert mount.status()["unstored_bytes"] == 0
    evict = mount.cli("image", "evict", pinned, check=False)
    assert evict.returncode == 1
    assert "pinned" in evict.stderr
    mount.cli("image", "unpin", pinned)
    mount.cli("image", "evict", pinned)
    assert mount.image(pinned)["cached_bytes"] == 0

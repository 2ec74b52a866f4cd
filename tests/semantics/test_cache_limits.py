"""docs/SEMANTICS.md, section 14: what the limits of the cache do to images."""

import os
import subprocess
from collections.abc import Callable, Iterator
from random import Random

import pytest
import trio

from tests.conftest import ExpectedWarnings
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import opened, report, status, wait_for_images
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

MIB = 1 << 20
LIMIT = 16 * MIB
OLD_ENOUGH_S = 5.5
"""What passes is the sentence's own time: nothing tells that a look at the overlays was made."""
OPTIONS = {"cache_max_bytes": LIMIT, "cache_min_free_bytes": 0, "fetch_request_bytes_max": MIB}


@pytest.fixture
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        yield running


def used(mount: BasefsMount) -> int:
    paths = [*mount.cache_dir.glob("chunks/*"), *mount.cache_dir.glob("state.sqlite*")]
    return sum(path.stat().st_blocks * 512 for path in paths)


def read_in_parts(mount: BasefsMount, image_id: str, data: bytes) -> None:
    """Each part by an open of its own, so the image is not in use for long; `used` is looked at after each."""
    for offset in range(0, len(data), MIB):
        with opened(mount.path(image_id)) as fd:
            assert os.pread(fd, MIB, offset) == data[offset : offset + MIB]
        assert used(mount) <= LIMIT


def test_limits(front: MisbehavingFront, basefs_mount: Callable[..., BasefsMount]) -> None:
    """[S1401] The cache never holds more than `cache_max_bytes`, counted in allocated blocks of the disk.

    [S1402] An image that is larger than the cache can be read whole.

    [S1404] An image that is open, pinned, or the base of an overlay that has been under `instances_path` for 5 s keeps
    what is here of it as long as there is something else that can go.

    [S1405] unlink of a pinned image succeeds and keeps its bytes.

    [S1406] A pin outlives a restart, and `basefs image evict` of a pinned image is refused.
    """
    sizes = {"open": 2, "base": 2, "pinned": 2, "large": 20, **{f"other {n}": 2 for n in range(8)}}
    images = {name: Random(name).randbytes(size * MIB) for name, size in sizes.items()}
    ids = {name: front.glance.add(data) for name, data in images.items()}
    mount = basefs_mount(front.conf_lines(), OPTIONS)
    wait_for_images(mount, len(ids))
    for name in ("open", "base", "pinned"):
        read_in_parts(mount, ids[name], images[name])
    mount.cli("image", "pin", ids["pinned"])
    mount.path(ids["pinned"]).unlink()
    overlay = mount.instances_path / "an-instance" / "disk"
    overlay.parent.mkdir()
    backing = f"backing_file={mount.path(ids['base'])},backing_fmt=raw"
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", backing, str(overlay), "8M"], check=True)
    trio.run(trio.sleep, OLD_ENOUGH_S)
    with opened(mount.path(ids["open"])):
        for n in range(8):
            read_in_parts(mount, ids[f"other {n}"], images[f"other {n}"])
        assert sum(report(mount, ids[f"other {n}"])["cached_bytes"] for n in range(8)) < 12 * MIB
        for name in ("open", "base", "pinned"):
            assert report(mount, ids[name])["cached_bytes"] == len(images[name]), name
    mount.unmount()
    mount.start()
    read_in_parts(mount, ids["large"], images["large"])
    assert report(mount, ids["pinned"])["pinned"]
    assert mount.cli("image", "evict", ids["pinned"], check=False).returncode == 1
    assert report(mount, ids["pinned"])["cached_bytes"] == len(images["pinned"])


def test_a_disk_with_too_little_space(
    front: MisbehavingFront, basefs_mount: Callable[..., BasefsMount], expected_warnings: ExpectedWarnings
) -> None:
    """[S1403] The cache leaves `cache_min_free_bytes` free on its disk; what cannot be stored is served all the
    same.
    """
    expected_warnings("the cache is full and nothing more may go")
    data = Random(1).randbytes(4 * MIB)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines(), {"cache_min_free_bytes": 1 << 60})
    wait_for_images(mount, 1)
    assert mount.path(image_id).read_bytes() == data
    assert report(mount, image_id)["cached_bytes"] == 0
    assert status(mount)["cache_state"] == "full"

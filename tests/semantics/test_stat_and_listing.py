"""docs/SEMANTICS.md, sections 3 and 4."""

import json
import os
import stat
import time
from collections.abc import Callable

import pytest

from tests.semantics.conftest import IMAGE_BYTES, NOVA, Image, eventually, listing_as, run_as, status
from tools.mount import BasefsMount, base_name
from tools.rig import Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance]


def test_a_listing_is_complete(mount: BasefsMount, lower_names: tuple[str, ...], rig: Rig, image: Image) -> None:
    """[S301] A listing shows every lower name, `.basefs`, and every image that is not refused, each once."""
    refused = rig.upload(b"x" * 1000, "listed?", "raw", container_format="ovf")
    hidden = rig.upload(b"y" * 1000, "under a lower file", "raw")
    assert not mount.path(refused).exists()
    (mount.mountpoint / "new").write_bytes(b"")
    mount.path(hidden).exists()
    renamed = mount.mountpoint / f"{base_name(hidden)}.part"
    renamed.write_bytes(b"lower")
    renamed.rename(mount.path(hidden))
    names = os.listdir(mount.mountpoint)
    assert len(names) == len(set(names))
    assert {*lower_names, "new", ".basefs", image.name, base_name(hidden)} <= set(names)
    assert base_name(refused) not in names
    servable = {line["base_name"] for line in mount_images(mount) if line["state"] != "refused"}
    assert servable <= set(names)


def mount_images(mount: BasefsMount) -> list[dict[str, object]]:
    images: list[dict[str, object]] = json.loads(mount.cli("image", "list", "-f", "json").stdout)
    return images


def test_nova_is_listed_what_is_used(
    mount: BasefsMount, lower_names: tuple[str, ...], new_image: Callable[[], Image]
) -> None:
    """[S302] To `nova_user` a listing shows of the images only those with local state: opened, warmed or touched by
    utime since they were last unlinked.
    """
    untouched, stated, opened, touched, warmed, unlinked = (new_image() for _ in range(6))
    stated.path.stat()
    opened.path.open("rb").close()
    os.utime(touched.path)
    mount.cli("image", "warm", warmed.id)
    unlinked.path.open("rb").close()
    unlinked.path.unlink()
    seen = set(listing_as(NOVA, mount.mountpoint))
    assert {*lower_names, ".basefs", opened.name, touched.name, warmed.name} <= seen
    assert not {untouched.name, stated.name, unlinked.name} & seen
    assert {untouched.name, stated.name, unlinked.name} <= set(os.listdir(mount.mountpoint))


def test_names_not_listed_resolve(image: Image) -> None:
    """[S303] Names that a listing leaves out for `nova_user` resolve for it like all others."""
    assert not image.is_listed_for_nova()
    seen = run_as(NOVA, image.mount.mountpoint, "stat", "-c", "%s", image.name)
    assert seen.stdout.split() == [str(IMAGE_BYTES).encode()]
    assert not image.is_listed_for_nova()


def test_size(image: Image) -> None:
    """[S401] `st_size` of an image is the size of what is shown."""
    assert image.path.stat().st_size == IMAGE_BYTES


def test_blocks(image: Image) -> None:
    """[S402] `st_blocks` of an image counts the bytes that are here, so `du` shows what it costs on this node."""
    assert image.report()["cached_bytes"] == 0
    image.path.stat()
    header = image.report()["cached_bytes"]
    assert 0 < header < IMAGE_BYTES
    eventually(lambda: image.path.stat().st_blocks == header / 512)
    assert image.path.read_bytes() == image.content
    eventually(lambda: image.path.stat().st_blocks == -(-IMAGE_BYTES // 512))


def test_block_size(image: Image) -> None:
    """[S403] `st_blksize` of an image is 131072."""
    assert image.path.stat().st_blksize == 131072


def test_owner_and_mode(image: Image) -> None:
    """[S404] An image is a regular file with one link and mode 0644, owned like the lower directory, until somebody
    changes that.
    """
    shown, directory = image.path.stat(), image.mount.mountpoint.stat()
    assert stat.S_ISREG(shown.st_mode)
    assert stat.S_IMODE(shown.st_mode) == 0o644
    assert shown.st_nlink == 1
    assert (shown.st_uid, shown.st_gid) == (directory.st_uid, directory.st_gid)


def test_mtime_without_local_state(image: Image) -> None:
    """[S405] An image without local state has the present as its mtime."""
    for _ in range(2):
        begun = time.time()
        eventually(lambda begun=begun: image.path.stat().st_mtime >= begun - 0.01)
        assert image.path.stat().st_mtime <= time.time() + 0.01


def test_mtime_with_local_state(image: Image) -> None:
    """[S406] From its first use on, an image has the time of that first use as its mtime, until utime sets another."""
    begun = time.time()
    image.path.open("rb").close()
    used = time.time()
    eventually(lambda: time.time() > used + 1.2)  # what the kernel remembers from before the open is gone
    assert begun - 0.01 <= image.path.stat().st_mtime <= used + 0.01
    image.path.read_bytes()
    assert begun - 0.01 <= image.path.stat().st_mtime <= used + 0.01
    os.utime(image.path, ns=(1_000_000_000, 2_000_000_001))
    assert (image.path.stat().st_atime_ns, image.path.stat().st_mtime_ns) == (1_000_000_000, 2_000_000_001)


def test_time_outs(image: Image) -> None:
    """[S407] The kernel may answer look-ups and stats from memory for 1 s; so a hundred stats in a row cost a handful
    of requests.
    """
    image.path.stat()
    before = status(image.mount)["fuse_requests"]
    for _ in range(100):
        image.path.stat()
    after = status(image.mount)["fuse_requests"]
    assert sum(after[kind] - before.get(kind, 0) for kind in ("lookup", "getattr")) <= 12

"""Images in a real Cinder, and hosts that share a volume."""

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MountFactory
from tests.faults.readers import eventually
from tools.linked import linking_options, volume_of, wait_for_state
from tools.mount import BasefsMount
from tools.rig import ApiError, Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance, pytest.mark.cinder]

MIB = 1 << 20


def disk(path: Path, size: int) -> bytes:
    """A file of random bytes with a hole."""
    noise = random.Random(size)
    content = noise.randbytes(size // 3) + bytes(size // 3) + noise.randbytes(size - 2 * (size // 3))
    path.write_bytes(content)
    return content


def attached_to(rig: Rig, image_id: str) -> list[str]:
    """The volumes that are attached on the image's behalf: its own, and clones of it."""
    own = rig.volume_of(image_id)
    clones = {one["id"] for one in rig.cinder_api().volumes() if one["source_volid"] == own}
    return [one["volume_id"] for one in rig.cinder_api().attachments() if one["volume_id"] in {own, *clones}]


def is_detached(rig: Rig, image_id: str) -> bool:
    return not attached_to(rig, image_id)


@contextmanager
def opened_on(mounts: list[BasefsMount], image_id: str) -> Iterator[list[int]]:
    """The image open on each mount, and read from a volume by all of them."""
    with ExitStack() as held:
        fds = [held.enter_context(open(mount.path(image_id), "rb")).fileno() for mount in mounts]
        for mount in mounts:
            wait_for_state(mount.path(image_id), "linked")
        yield fds


def test_hosts_share_a_multiattach_volume_and_clone_another_while_glance_works_on_both(
    cinder_rig: Rig, basefs_mount: MountFactory, tmp_path: Path
) -> None:
    content = disk(tmp_path / "raw", 3 * MIB)
    shared = cinder_rig.place_cinder(tmp_path / "raw", "shared by hosts")
    cloned = cinder_rig.place_cinder(tmp_path / "raw", "cloned by each host", multiattach=False)
    mounts = [
        basefs_mount(cinder_rig, linking_options(host, detach_idle_s=0.1), name=host) for host in ("here", "there")
    ]
    glance = cinder_rig.api()
    for image_id, volumes in ((shared, 1), (cloned, 2)):
        with opened_on(mounts, image_id) as fds:
            attached = attached_to(cinder_rig, image_id)
            assert (len(attached), len(set(attached))) == (2, volumes)
            assert {volume_of(mount.path(image_id)) for mount in mounts} == {cinder_rig.volume_of(image_id)}
            assert (cinder_rig.volume_of(image_id) in attached) == (image_id == shared)
            assert glance.call("GET", f"/v2/images/{image_id}/file")[1] == content
            if image_id == shared:
                with pytest.raises(ApiError):
                    glance.delete(image_id)
            for fd in fds:
                assert os.pread(fd, len(content), 0) == content
        eventually(partial(is_detached, cinder_rig, image_id))
        glance.delete(image_id)
    eventually(
        lambda: not {shared, cloned} & {one["metadata"].get("basefs_image_id") for one in volumes_of(cinder_rig)}
    )


def volumes_of(rig: Rig) -> list[dict[str, Any]]:
    return rig.cinder_api().volumes()

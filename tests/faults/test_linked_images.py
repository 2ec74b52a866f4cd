"""Images in a real Cinder: readers while volumes come and go under them, and hosts that share a volume."""

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from basefs.control.client import ControlClient
from tests.conftest import MountFactory
from tests.faults.readers import eventually, opened, pread
from tools.linked import LIMIT_S, linking_options, state_of, volume_of, wait_for_state
from tools.mount import BasefsMount
from tools.rig import ApiError, Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance, pytest.mark.cinder]

MIB = 1 << 20
KIB = 1 << 10
PAUSE_S = 0.002
"""Between two reads of a reader: the Cinder that is waited for needs the processors, too."""
READS = 8
"""Of each reader, before the volume is taken away or brought back once more."""


class Readers:
    """Threads that read one file at random, past the page cache, and compare."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.wrong: list[str] = []
        self.reads = 0
        self._content = content
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(seed,)) for seed in range(2)]

    def _read(self, seed: int) -> None:
        choose = random.Random(seed)
        try:
            with opened(self.path) as fd:
                while not self._is_over.wait(PAUSE_S):
                    offset = choose.randrange(0, len(self._content), 4 * KIB)
                    length = min(choose.choice((4, 64, 256)) * KIB, len(self._content) - offset)
                    if pread(fd, offset, length) != self._content[offset : offset + length]:
                        self.wrong.append(f"other bytes in [{offset}, {offset + length})")
                    self.reads += 1
        except OSError as error:
            self.wrong.append(str(error))

    @contextmanager
    def running(self) -> Iterator["Readers"]:
        """They read until the block ends."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            for thread in self._threads:
                thread.join()

    def wait_for_reads(self) -> None:
        """Some more reads were right, or one was not."""
        until = self.reads + READS
        eventually(lambda: self.reads >= until or self.wrong)
        assert not self.wrong


def disk(path: Path, size: int) -> bytes:
    """A file of random bytes with a hole."""
    noise = random.Random(size)
    content = noise.randbytes(size // 3) + bytes(size // 3) + noise.randbytes(size - 2 * (size // 3))
    path.write_bytes(content)
    return content


def test_readers_see_the_same_bytes_while_volumes_come_and_go(
    cinder_rig: Rig, basefs_mount: MountFactory, tmp_path: Path
) -> None:
    # So large that what is read through Glance meanwhile is not all of it: what is here whole is not linked.
    content = disk(tmp_path / "raw", 32 * MIB + 512)
    subprocess.run(
        ["qemu-img", "convert", "-c", "-O", "qcow2", tmp_path / "raw", tmp_path / "qcow2"], check=True, timeout=60
    )
    images = [
        cinder_rig.place_cinder(tmp_path / "raw", "shared"),
        cinder_rig.place_cinder(tmp_path / "qcow2", "a view of a clone", "qcow2", multiattach=False),
    ]
    mount = basefs_mount(cinder_rig, linking_options("faults"))
    control = ControlClient(mount.directory / "control.sock", answer_deadline_s=LIMIT_S)
    with ExitStack() as held:
        all_readers = [Readers(mount.path(one), content) for one in images]
        for readers in all_readers:
            held.enter_context(readers.running())
        for readers in all_readers:
            wait_for_state(readers.path, "linked")
        for image_id, readers in zip(images, all_readers, strict=True):
            readers.wait_for_reads()
            control.detach(image_id, force=True)
            assert state_of(readers.path) not in ("linked", "linking")
            readers.wait_for_reads()
            with open(readers.path, "rb"):
                pass  # an image that an operator detached is linked again when it is opened
        for readers in all_readers:
            wait_for_state(readers.path, "linked")
            readers.wait_for_reads()
    assert [readers.wrong for readers in all_readers] == [[], []]


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

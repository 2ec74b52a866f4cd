"""A real Ceph and radosgw that die under readers of a mount and come back: no wrong byte, no error for the patient."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tools.guest import create_overlay
from tools.mount import BasefsMount
from tools.rig import Rig, radosgw

pytestmark = [pytest.mark.mount, pytest.mark.glance, pytest.mark.ceph]

MIB = 1 << 20
SIZE = 48 * MIB + 4321
STEP = 256 * 1024
READER_LIMIT_S = 200.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("durable-rig"), object_stores="durable") as running:
        radosgw.allow_reader(running.ceph.s3_url)
        yield running


def options(rig: Rig) -> dict[str, object]:
    return {
        "rbd.pools": "images",
        "rbd.ceph_conf": rig.ceph.conf_path,
        "rbd.op_timeout_s": 3,
        "s3.endpoint": rig.ceph.s3_url,
        "s3.buckets": radosgw.BUCKET,
        "s3.access_key": radosgw.READER_KEY,
        "s3.secret_key": radosgw.READER_SECRET,
        "other_io_deadline_s": 150,
        "hydrate_concurrency_max": 0,
        "read_ahead_bytes": 0,
    }


class Reader:
    """Reads a whole image in steps, in a thread; `at` is called at a step, before it."""

    def __init__(self, path: Path, data: bytes, at: dict[int, Callable[[], None]]) -> None:
        self.error: BaseException | None = None
        self.wrong = 0
        self._thread = threading.Thread(target=self._run, args=(path, data, at), daemon=True)
        self._thread.start()

    def _run(self, path: Path, data: bytes, at: dict[int, Callable[[], None]]) -> None:
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                for number, offset in enumerate(range(0, len(data), STEP)):
                    at.get(number, lambda: None)()
                    if os.pread(fd, STEP, offset) != data[offset : offset + STEP]:
                        self.wrong += 1
            finally:
                os.close(fd)
        except BaseException as exc:
            self.error = exc

    def join(self) -> None:
        self._thread.join(READER_LIMIT_S)
        assert not self._thread.is_alive(), "the reader hangs"
        assert self.error is None
        assert self.wrong == 0


def read_from(mount: BasefsMount, image_id: str) -> str:
    return str(mount.image(image_id)["read_from"])


@pytest.mark.parametrize(("store", "source", "daemon"), [("ceph", "rbd", "osd.0"), ("s3", "s3", "rgw")])
def test_what_is_killed_under_a_reader_and_comes_back_costs_it_nothing_but_time(
    rig: Rig, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings, store: str, source: str, daemon: str
) -> None:
    data = os.urandom(SIZE)
    image_id = rig.upload(data, f"in {store}", store=store)
    expected_warnings("")  # what is told meanwhile is the subject of others
    mount = basefs_mount(rig, options(rig))
    path = mount.path(image_id)
    with open(path, "rb") as first:
        assert first.read(MIB) == data[:MIB]
    assert source in read_from(mount, image_id)
    again = threading.Timer(5.0, rig.ceph.start_daemon, [daemon])

    def kill() -> None:
        rig.ceph.kill(daemon)
        again.start()

    Reader(path, data, {SIZE // STEP // 2: kill}).join()
    again.join()


@pytest.mark.parametrize(("store", "source", "daemon"), [("ceph", "rbd", "osd.0"), ("s3", "s3", "rgw")])
def test_what_is_killed_under_qemu_and_comes_back_costs_it_no_error(
    rig: Rig,
    basefs_mount: MountFactory,
    expected_warnings: ExpectedWarnings,
    tmp_path: Path,
    store: str,
    source: str,
    daemon: str,
) -> None:
    data = os.urandom(SIZE // 512 * 512)
    image_id = rig.upload(data, f"in {store} for qemu", store=store)
    expected_warnings("")
    mount = basefs_mount(rig, options(rig))
    base = mount.path(image_id)
    create_overlay(base, tmp_path / "overlay")
    convert = ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=65536", f"if={tmp_path / 'overlay'}"]
    qemu = subprocess.Popen([*convert, f"of={tmp_path / 'read'}"], stderr=subprocess.PIPE)
    try:
        while base.stat().st_blocks * 512 < SIZE // 4:
            assert qemu.poll() is None, "it was done before anything was killed"
            time.sleep(0.002)
        qemu.send_signal(signal.SIGSTOP)  # or it might be done before
        assert source in read_from(mount, image_id)
        rig.ceph.kill(daemon)
        assert qemu.poll() is None, "it was done before anything was killed"
        qemu.send_signal(signal.SIGCONT)
        again = threading.Timer(5.0, rig.ceph.start_daemon, [daemon])
        again.start()
        _, complaints = qemu.communicate(timeout=READER_LIMIT_S)
        again.join()
    finally:
        qemu.kill()
        qemu.wait()
    assert (qemu.returncode, complaints) == (0, b"")
    assert (tmp_path / "read").read_bytes() == data


def test_an_image_deleted_in_ceph_is_never_read_as_zeros(
    rig: Rig, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    data = os.urandom(SIZE)
    image_id = rig.upload(data, "to be deleted", store="ceph")
    expected_warnings("")
    mount = basefs_mount(rig, options(rig) | {"other_io_deadline_s": 5})
    fd = os.open(mount.path(image_id), os.O_RDONLY)
    try:
        assert os.pread(fd, 4096, 0) == data[:4096]
        rig.api().delete(image_id)
        for offset in range(32 * MIB, SIZE, 4 * MIB):
            with contextlib.suppress(OSError):
                assert os.pread(fd, 4096, offset) == data[offset : offset + 4096]
    finally:
        os.close(fd)

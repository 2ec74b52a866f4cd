"""docs/SEMANTICS.md, section 19: images that become files of the lower directory."""

import mmap
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from basefs.core.inodes import LOWER
from basefs.handlers.parts import host_name
from basefs.keeper_restarts import KILLED_QUICK_S
from tests.conftest import ExpectedWarnings
from tests.handlers.graduation_node import disk_content, qcow2_of
from tests.semantics.conftest import NOVA, eventually, listing_as, opened, report, status
from tools.mount import BasefsMount, base_name
from tools.rig import Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance]

SIZE = 3_000_007
CONTENT = disk_content(5, SIZE)
DISK = disk_content(6, 6000 * 512)
OLD_NS = 1_600_000_000_000_000_007
PAGES_BYTES = -(-SIZE // mmap.PAGESIZE) * mmap.PAGESIZE
SAFE = "it is safe to unmount"
ON: dict[str, object] = {"graduate": True}


def drain(mount: BasefsMount) -> str:
    done = mount.cli("drain")
    assert SAFE in done.stdout
    assert done.stderr == ""
    return done.stdout


def lower_names(mount: BasefsMount) -> list[str]:
    with os.scandir(mount.mountpoint) as entries:
        return sorted(entry.name for entry in entries if entry.inode() & LOWER)


def has_chunks(mount: BasefsMount) -> bool:
    return any((mount.cache_dir / "chunks").iterdir())


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """A cache directory on another file system than the mount: a tmpfs."""
    path = Path(tempfile.mkdtemp(prefix="basefs-graduation-", dir="/dev/shm"))
    yield path / "cache"
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def qcow2(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return qcow2_of(tmp_path_factory.mktemp("qcow2"), DISK, "-c")


@pytest.mark.parametrize("way", ["rename", "copy", "convert"])
def test_who_has_an_image_open_goes_on_and_unmounting_leaves_the_file(
    basefs_mount: Callable[..., BasefsMount], rig: Rig, other_disk: Path, qcow2: bytes, way: str
) -> None:
    """[S1901] An image that is complete and verified becomes a plain raw file of the lower directory under its own
    name, with the size, owner, mode and mtime that it was shown with, and its place in the cache is free again.
    """
    content = DISK if way == "convert" else CONTENT
    options = ON | ({"cache_dir": other_disk} if way == "copy" else {})
    image_id = rig.upload(qcow2, "graduates", "qcow2") if way == "convert" else rig.upload(content, "graduates", "raw")
    mount = basefs_mount(options=options)
    mount.cache_dir = options.get("cache_dir", mount.cache_dir)
    path = mount.path(image_id)
    with ExitStack() as stack:
        fd = stack.enter_context(opened(path))
        direct = stack.enter_context(opened(path, os.O_RDONLY | os.O_DIRECT))
        mapping = stack.enter_context(mmap.mmap(fd, len(content), prot=mmap.PROT_READ))
        page = stack.enter_context(mmap.mmap(-1, 1 << 20))
        os.utime(path, ns=(OLD_NS, OLD_NS))
        before = path.stat()
        assert mapping[:4096] == content[:4096]
        drain(mount)
        assert lower_names(mount) == [path.name]
        after = path.stat()
        assert after.st_ino != before.st_ino
        shown = ("st_size", "st_mode", "st_uid", "st_gid", "st_mtime_ns")
        assert [getattr(after, name) for name in shown] == [getattr(before, name) for name in shown]
        assert report(mount, image_id)["state"] == "graduated"
        assert not has_chunks(mount)
        assert os.pread(fd, len(content), 0) == content
        assert mapping[:] == content
        assert os.preadv(direct, [page], 1 << 20) == 1 << 20
        assert page[:] == content[1 << 20 : 2 << 20]
        assert path.read_bytes() == content
    eventually(lambda: report(mount, image_id)["open_handles"] == 0)
    mount.unmount()
    assert os.listdir(mount.mountpoint) == [path.name]
    assert (mount.mountpoint / path.name).read_bytes() == content


def test_after_novas_unlink_open_handles_go_on_and_the_name_is_lazy_again(
    basefs_mount: Callable[..., BasefsMount], rig: Rig, expected_warnings: ExpectedWarnings
) -> None:
    """[S1902] Handles and mappings from before go on with the same bytes, also when that file is unlinked, and when the
    server is killed after it.

    [S1903] utime, unlink and rename of the name are then done to that file; once it is gone the name is a lazy image
    again, as after unlink.
    """
    expected_warnings(r"died \(signal SIGKILL\)")
    image_id = rig.upload(CONTENT, "unlinked", "raw")
    mount = basefs_mount(options=ON)
    path = mount.path(image_id)
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, PAGES_BYTES) as pages:
        drain(mount)
        os.utime(path, ns=(OLD_NS, OLD_NS))
        aside = mount.mountpoint / "aside"
        path.rename(aside)
        assert aside.stat().st_mtime_ns == OLD_NS
        assert path.stat().st_ino < LOWER, "the image, and no lower file"
        aside.unlink()
        assert os.preadv(fd, [pages], 0) == SIZE
        assert pages[:SIZE] == CONTENT
        assert report(mount, image_id)["state"] == "cold"
        assert path.name not in listing_as(NOVA, mount.mountpoint)
        kill_server(mount)
        fetched = status(mount)["fetched_bytes"]
        pages[:SIZE] = bytes(SIZE)
        assert os.preadv(fd, [pages], 0) == SIZE
        assert pages[:SIZE] == CONTENT
        assert path.read_bytes() == CONTENT
        assert status(mount)["fetched_bytes"] == fetched, "the next server reads the file that has no name, too"
    eventually(lambda: report(mount, image_id)["open_handles"] == 0)
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4096) as page:
        assert os.preadv(fd, [page], 1 << 20) == 4096
        assert page[:] == CONTENT[1 << 20 :][:4096]
    # A reader has its bytes before the rest of their chunk has come and is kept.
    eventually(lambda: report(mount, image_id)["cached_bytes"] > 0)


def kill_server(mount: BasefsMount) -> None:
    """kill -9; on return another one serves."""
    pid = status(mount)["server_pid"]
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)
    assert status(mount)["server_pid"] != pid


@contextmanager
def killed_at(pid: int, syscall: str, log: Path) -> Iterator[None]:
    """The process dies by SIGKILL at its first such system call from here on."""
    inject = f"inject={syscall}:signal=SIGKILL:when=1"
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), "-e", f"trace={syscall}", "-e", inject, "-o", str(log)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tracer.stderr is not None
    try:
        while "attached" not in (line := tracer.stderr.readline()):
            assert line, "strace cannot attach"
        yield
    finally:
        tracer.terminate()
        tracer.communicate()


@pytest.mark.parametrize("way", ["rename", "copy"])
def test_a_server_killed_at_a_step_loses_nothing(
    basefs_mount: Callable[..., BasefsMount],
    rig: Rig,
    other_disk: Path,
    tmp_path: Path,
    expected_warnings: ExpectedWarnings,
    way: str,
) -> None:
    """[S1904] A server that is killed at any step of it leaves the image as it was or the whole file, nothing half-made
    under its name, and the space comes back.
    """
    # strace may take the exit status for itself.
    expected_warnings(r"died \((signal SIGKILL|it is traced)\)")
    options = ON | ({"cache_dir": other_disk} if way == "copy" else {})
    mount = basefs_mount(options=options)
    mount.cache_dir = options.get("cache_dir", mount.cache_dir)
    names: list[str] = []
    for syscall in ("fchmod", "fsync", "renameat2", "unlink") if way == "rename" else ("fsync", "unlink"):
        image_id = rig.upload(CONTENT, f"killed at {syscall}", "raw")
        path = mount.path(image_id)
        with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, PAGES_BYTES) as pages:
            mount.cli("image", "warm", image_id)
            threading.Event().wait(2 * KILLED_QUICK_S)  # else the keeper suspects what it had handed out again
            pid = status(mount)["server_pid"]
            with killed_at(pid, syscall, tmp_path / "strace"):
                done = mount.cli("drain", check=False)
            assert done.returncode == 1, done.stdout
            eventually(lambda: status(mount)["server_pid"] != pid)  # noqa: B023
            assert os.preadv(fd, [pages], 0) == SIZE
            assert pages[:SIZE] == CONTENT
            finished = [name for name in lower_names(mount) if not name.endswith(".part")]
            assert finished in (names, sorted([*names, path.name])), syscall
            drain(mount)
            names = sorted([*names, path.name])
            assert lower_names(mount) == names
            eventually(lambda: not has_chunks(mount))
            pages[:SIZE] = bytes(SIZE)
            assert os.preadv(fd, [pages], 0) == SIZE
            assert pages[:SIZE] == CONTENT
            assert path.read_bytes() == CONTENT
            assert report(mount, image_id)["state"] == "graduated"


def test_a_server_killed_while_qemu_img_writes_leaves_neither_part_nor_process(
    basefs_mount: Callable[..., BasefsMount],
    rig: Rig,
    tmp_path: Path,
    qcow2: bytes,
    expected_warnings: ExpectedWarnings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[S1904] A server that is killed at any step of it leaves the image as it was or the whole file, nothing half-made
    under its name, and the space comes back.
    """
    expected_warnings(r"died \(signal SIGKILL\)")
    image_id = rig.upload(qcow2, "killed while it is converted", "qcow2")
    begun, tools = tmp_path / "begun", tmp_path / "bin"
    tools.mkdir()
    os.mkfifo(begun)
    # The first one says who it is and stops; later ones are the real one.
    (tools / "qemu-img").write_text(
        f"#!/bin/sh\nif mkdir {tmp_path}/once 2>/dev/null; then echo $$ > {begun}; kill -STOP $$; fi\n"
        'exec /usr/bin/qemu-img "$@"\n'
    )
    (tools / "qemu-img").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    mount = basefs_mount(options=ON)
    path = mount.path(image_id)
    part = f".basefs.{base_name(image_id)}.{host_name()}.part"
    with opened(path) as fd:
        command = subprocess.Popen(
            [mount_binary(), "drain", "--config-file", str(mount.conf_path)], env=mount.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with begun.open() as fifo:
            orphan = os.pidfd_open(int(fifo.read()))
        assert lower_names(mount) == [part]
        kill_server(mount)
        assert command.wait(30) == 1
        assert select.select([orphan], [], [], 20)[0], "the next server ends it"
        os.close(orphan)
        eventually(lambda: lower_names(mount) == [])
        assert os.pread(fd, len(DISK), 0) == DISK
        drain(mount)
        assert lower_names(mount) == [path.name]
        assert path.read_bytes() == DISK


def mount_binary() -> str:
    from tools.mount import BASEFS

    return str(BASEFS)


def test_what_cannot_be_drained_is_said_with_the_reason(
    basefs_mount: Callable[..., BasefsMount], rig: Rig, expected_warnings: ExpectedWarnings
) -> None:
    """[S1905] `basefs drain` does so with every image in use, and its exit code 0 says that it is safe to unmount; what
    cannot be had is listed with the reason.
    """
    expected_warnings("Glance answered 404")
    good, gone = (rig.upload(CONTENT, f"drain {number}", "raw") for number in range(2))
    mount = basefs_mount(options=ON)
    with opened(mount.path(good)), opened(mount.path(gone)):
        rig.api().delete(gone)
        done = mount.cli("drain", check=False)
        assert lower_names(mount) == [base_name(good)]
    assert done.returncode == 1
    assert SAFE not in done.stdout
    assert good in done.stdout
    assert f"{gone}: not graduated: " in done.stderr
    assert "(in use: open)" in done.stderr
    assert "not safe to unmount: 1 of 2 images" in done.stderr


def test_with_graduation_switched_off_drain_names_the_option(basefs_mount: Callable[..., BasefsMount]) -> None:
    """[S1907] With `graduate = false` no image becomes a file, and drain says so."""
    done = basefs_mount().cli("drain", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "graduate" in done.stderr


def test_overlays_read_the_same_after_drain_and_unmount(
    basefs_mount: Callable[..., BasefsMount], rig: Rig, qcow2: bytes, tmp_path: Path
) -> None:
    """[S1906] After drain and unmount the lower directory has what nova's own download would have left, and overlays on
    it read the same bytes as before.

    [S1908] Where the lower directory has a file of the image's name already, that stays as it is.
    """
    raw, packed, own = (
        rig.upload(CONTENT, "base", "raw"),
        rig.upload(qcow2, "base", "qcow2"),
        rig.upload(CONTENT, "own"),
    )
    mount = basefs_mount(options=ON)
    mount.path(own).touch()
    (mount.mountpoint / "part").write_bytes(b"nova's own")
    (mount.mountpoint / "part").rename(mount.path(own))
    overlays = []
    for number, image_id in enumerate((raw, packed, own)):
        disk = mount.instances_path / str(number) / "disk"
        disk.parent.mkdir()
        arguments = ("-o", f"backing_file={mount.path(image_id)},backing_fmt=raw")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *arguments, disk], check=True)
        overlays.append(disk)
    subprocess.run(["qemu-io", "-c", "write -P 7 65536 4096", overlays[1]], check=True, stdout=subprocess.DEVNULL)
    before = [whole_disk(disk, tmp_path) for disk in overlays]
    said = drain(mount)
    assert all(image_id in said for image_id in (raw, packed, own))
    assert [whole_disk(disk, tmp_path) for disk in overlays] == before
    mount.unmount()
    assert sorted(os.listdir(mount.mountpoint)) == sorted(base_name(image_id) for image_id in (raw, packed, own))
    assert [whole_disk(disk, tmp_path) for disk in overlays] == before
    assert mount.path(own).read_bytes() == b"nova's own"
    by_nova = tmp_path / "as nova converts it"
    (tmp_path / "packed").write_bytes(qcow2)
    convert = ["qemu-img", "convert", "-t", "none", "-O", "raw", "-f", "qcow2", tmp_path / "packed", by_nova]
    subprocess.run(convert, check=True)
    assert mount.path(packed).read_bytes() == by_nova.read_bytes()
    assert mount.path(packed).stat().st_blocks <= 1.1 * by_nova.stat().st_blocks


def whole_disk(overlay: Path, directory: Path) -> bytes:
    """What a guest reads on it."""
    raw = directory / "whole.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, raw], check=True)
    return raw.read_bytes()


def test_an_image_in_use_becomes_a_file_by_itself(
    basefs_mount: Callable[..., BasefsMount], rig: Rig, qcow2: bytes
) -> None:
    """[S1909] An image in use becomes a file by itself, `hydrate_delay_s` after its first use, once all of it is here
    and verified.
    """
    image_id, unused = rig.upload(qcow2, "in use", "qcow2"), rig.upload(CONTENT, "not in use", "raw")
    mount = basefs_mount(options=ON | {"hydrate_concurrency_max": 2, "hydrate_delay_s": 0.0})
    path = mount.path(image_id)
    mount.path(unused).read_bytes()
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, len(DISK)) as pages:
        eventually(lambda: report(mount, image_id)["state"] == "graduated")
        assert os.preadv(fd, [pages], 0) == len(DISK)
        assert pages[:] == DISK
        assert path.read_bytes() == DISK
        assert lower_names(mount) == [path.name]

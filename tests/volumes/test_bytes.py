"""Bytes of a device or file, by its fd."""

import errno
import os
import subprocess

import pytest

from basefs import errors
from basefs.volumes.bytes import FdVolumeBytes
from basefs.volumes.connection import read_connection, sealed_connection

DATA = os.urandom(1 << 20)


@pytest.fixture
def volume(tmp_path):
    (tmp_path / "volume").write_bytes(DATA)
    opened = FdVolumeBytes(os.open(tmp_path / "volume", os.O_RDONLY))
    yield opened
    opened.close()


def target_of(size: int) -> memoryview:
    return memoryview(bytearray(size))


def test_a_read_gives_exactly_the_bytes(volume):
    assert volume.size == len(DATA)
    for offset, length in ((0, 1), (0, len(DATA)), (4095, 8193), (len(DATA) - 1, 1), (len(DATA), 0)):
        assert volume.read(offset, length) == DATA[offset : offset + length]


def test_a_read_past_the_end_is_an_error(volume):
    for offset, length in ((len(DATA), 1), (len(DATA) - 1, 2), (len(DATA) + 4096, 1)):
        with pytest.raises(OSError, match="ends after"):
            volume.read(offset, length)
        assert not volume.read_now([target_of(length)], offset)


def test_what_is_in_memory_is_read_without_waiting(volume):
    volume.read(0, len(DATA))
    target = target_of(5000)
    assert volume.read_now([target[:1], target[1:]], 777)
    assert target == DATA[777:5777]


def test_a_file_system_that_cannot_tell_is_asked_once(volume, monkeypatch):
    calls = []

    def preadv(*_args):
        calls.append(1)
        raise OSError(errno.EOPNOTSUPP, "as NFS says")

    monkeypatch.setattr(os, "preadv", preadv)
    assert not volume.read_now([target_of(10)], 0)
    assert not volume.read_now([target_of(10)], 0)
    assert len(calls) == 1
    assert volume.read(0, 10) == DATA[:10]


def test_an_error_of_now_is_not_remembered(volume, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", lambda *_args: (_ for _ in ()).throw(OSError(errno.EAGAIN, "cold")))
        assert not volume.read_now([target_of(10)], 0)
    assert volume.read_now([target_of(10)], 0)


def test_once_closed_it_answers_as_one_that_failed(volume):
    assert volume.fd_to_hold() is not None
    volume.close()
    volume.close()
    assert volume.fd_to_hold() is None
    assert not volume.read_now([target_of(1)], 0)
    with pytest.raises(OSError, match="descriptor"):
        volume.read(0, 1)


def test_a_block_device_has_the_size_of_the_device(tmp_path):
    (tmp_path / "backing").write_bytes(DATA)
    device = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", tmp_path / "backing"], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        opened = FdVolumeBytes(os.open(device, os.O_RDONLY))
        assert opened.size == len(DATA)
        assert opened.read(513, 100_000) == DATA[513:100_513]
        assert opened.read_now([target_of(4096)], 4096)
        opened.close()
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_anything_else_is_no_volume_and_stays_the_callers(tmp_path, kind):
    fds = os.pipe() if kind == "pipe" else (os.open(tmp_path, os.O_RDONLY),)
    with pytest.raises(errors.VolumeError, match="neither"):
        FdVolumeBytes(fds[0])
    for fd in fds:
        os.close(fd)


def test_a_connection_is_sealed_and_read_again(tmp_path):
    fd = sealed_connection({"a": [1, 2]}, {"path": "/dev/x"})
    assert read_connection(fd) == ({"a": [1, 2]}, {"path": "/dev/x"})
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(OSError, match="not permitted"):
        os.truncate(fd, 0)
    os.close(fd)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"connection_info": 1, "device_info": null}', b"\xff"])
def test_what_is_no_connection_is_an_error_that_shows_nothing_of_it(tmp_path, content):
    (tmp_path / "secret").write_bytes(content)
    fd = os.open(tmp_path / "secret", os.O_RDONLY)
    with pytest.raises(errors.VolumeError, match=r"^what was kept of the connection cannot be read$"):
        read_connection(fd)
    os.close(fd)

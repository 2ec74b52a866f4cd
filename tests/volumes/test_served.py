"""Reads of a volume that another process has open."""

import errno
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basefs.volumes import served
from basefs.volumes.served import ServedVolumeBytes, serve

DATA = os.urandom(300_000)


class Image:
    """rbd.Image, as far as it is used: reads at an offset, side by side; `failure` is raised by them."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def read(self, offset: int, length: int) -> bytes:
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return DATA[offset : offset + length]


class Wrapper(io.BytesIO):
    """os-brick's RBDVolumeIOWrapper."""

    rbd_image: Image


@pytest.fixture(params=["file", "image"])
def volume(request):
    made = Wrapper(DATA)
    if request.param == "image":
        made.rbd_image = Image()
    return made


@pytest.fixture
def ended():
    return threading.Event()


@pytest.fixture
def opened(volume, ended):
    streams, size = serve(volume)
    made = ServedVolumeBytes(streams, size, ended.set)
    yield made
    if isinstance(getattr(volume, "rbd_image", None), Image):
        volume.rbd_image.gate.set()
    made.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, len(DATA)), length=st.integers(0, len(DATA)))
def test_a_read_gives_exactly_the_bytes_or_an_error(opened, offset, length):
    if offset + length <= len(DATA):
        assert opened.read(offset, length) == DATA[offset : offset + length]
    else:
        with pytest.raises(OSError, match="ends after"):
            opened.read(offset, length)


def test_large_reads_come_in_pieces(opened, monkeypatch):
    monkeypatch.setattr(served, "READ_BYTES_MAX", 1000)
    assert opened.read(17, 250_001) == DATA[17:250_018]


def test_many_threads_read_at_a_time(opened):
    offsets = range(0, len(DATA) - 5000, 1777)
    with ThreadPoolExecutor(16) as pool:
        for offset, data in zip(offsets, pool.map(lambda offset: opened.read(offset, 5000), offsets), strict=True):
            assert data == DATA[offset : offset + 5000]


def test_nothing_is_had_without_waiting_and_no_fd_can_be_held(opened):
    assert not opened.read_now([memoryview(bytearray(1))], 0)
    assert opened.fd_to_hold() is None


@pytest.mark.parametrize("volume", ["image"], indirect=True)
def test_an_error_of_the_library_is_an_error_of_that_read_only(volume, opened):
    for failure, code in ((OSError(errno.ENOLINK, "x"), errno.ENOLINK), (ValueError("closed"), errno.EIO)):
        volume.rbd_image.failure = failure
        with pytest.raises(OSError, match=os.strerror(code)):
            opened.read(0, 10)
    volume.rbd_image.failure = None
    assert opened.read(0, 10) == DATA[:10]


@pytest.mark.parametrize("volume", ["image"], indirect=True)
def test_a_library_that_hangs_is_an_error_after_a_while_and_closing_does_not_wait_for_it(volume, ended, monkeypatch):
    monkeypatch.setattr(served, "READ_LIMIT_S", 0.2)
    streams, size = serve(volume)
    opened = ServedVolumeBytes(streams, size, ended.set)
    volume.rbd_image.gate.clear()
    with pytest.raises(OSError, match="timed out"):
        opened.read(0, 10)
    volume.rbd_image.gate.set()
    with pytest.raises(OSError, match="ended"):
        opened.read(0, 10)  # its answer would be that of the read before
    opened.close()
    assert ended.is_set()


def test_once_closed_it_answers_as_one_that_failed(opened, ended):
    opened.close()
    with pytest.raises(OSError, match="ended"):
        opened.read(0, 10)
    assert ended.is_set()


def test_a_process_that_ended_is_an_error(volume, ended):
    streams, size = serve(volume)
    for stream in streams:
        stream.shutdown(2)
    opened = ServedVolumeBytes(streams, size, ended.set)
    with pytest.raises(OSError, match=r"ended|pipe"):
        opened.read(0, 10)
    opened.close()

"""docs/SEMANTICS.md, section 22: where images are read from."""

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.fakes.memory_web import MemoryWeb
from tests.qemu.shared_mount import server_pid
from tests.semantics.conftest import Image, eventually, front_mount, opened, report, status
from tools.mount import BasefsMount
from tools.rig import Rig

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE = 6 * MIB + 5
DATA = Random(22).randbytes(SIZE)
IMAGES = 13
SECRET = "s3cr3t-k3y"


@dataclass
class Site:
    """A Glance in memory, a web server with the same images, and a mount that may read both."""

    glance: MisbehavingFront
    front: MisbehavingFront
    web: MemoryWeb
    mount: BasefsMount
    images: Iterator[str]

    def new(self, **location: object) -> str:
        """An image of DATA at the web server, of which nobody knows yet."""
        image_id = next(self.images)
        self.web.put(f"/{image_id}", DATA)
        return image_id

    def glance_sent(self, image_id: str) -> int:
        return self.glance.count(f"{image_id}/file")

    def web_was_asked(self, image_id: str) -> int:
        return self.front.count(f"/{image_id}")

    def read(self, image_id: str, offset: int = 0, size: int = SIZE) -> None:
        path = self.mount.path(image_id)
        with opened(path) as fd:
            while size > 0 and offset < SIZE:
                piece = os.pread(fd, min(size, MIB), offset)
                assert piece == DATA[offset : offset + min(size, MIB)]
                offset, size = offset + len(piece), size - len(piece)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    web = MemoryWeb()
    with MisbehavingFront() as glance, MisbehavingFront() as front:
        front.extra_routes["/"] = web
        images = [glance.glance.add(DATA, id=str(uuid.UUID(int=n + 1))) for n in range(IMAGES)]
        for image_id in images:
            glance.glance.locations[image_id] = [f"{front.url}/{image_id}"]
        options = {"http_location.allowed_hosts": front.url.partition("//")[2], "other_io_deadline_s": 60}
        may_log = (
            "http at 127.0.0.1",
            "Glance is away",
            "image catalog",
            "another hash",
            "do not have the sha512",
            "SIGKILL",
            "lookup answered EIO",
        )
        with front_mount(glance, tmp_path_factory.mktemp("sources"), options, may_log) as mount:
            yield Site(glance, front, web, mount, iter(images))
            assert SECRET not in mount.log_text


def source_of(mount: BasefsMount, image_id: str) -> str:
    return os.getxattr(mount.path(image_id), "user.basefs.source").decode()


def test_without_a_store_nothing_else_is_asked(image: Image, rig: Rig) -> None:
    """[S2201] Without a store in the configuration no location is asked for, and every byte comes from Glance."""
    assert image.path.read_bytes() == image.content
    asked = [one.path for one in rig.requests(image.id)]
    assert any(path.endswith("/file") for path in asked)
    assert not any("locations" in path for path in asked)
    assert image.report()["sources"] == []


@pytest.mark.glance
def test_an_image_at_a_web_server(rig: Rig, basefs_mount: MountFactory) -> None:
    """[S2202] An image at a location on an allowed web server is read from there by ranges, also where Glance gives
    it as one stream only; Glance sends none of its bytes.
    """
    image_id = rig.upload_web(DATA, "at a web server")
    mount = basefs_mount(rig, {"http_location.allowed_hosts": urlsplit(rig.web_url).netloc})
    with opened(mount.path(image_id)) as fd:
        for offset in (5 * MIB, 0, 3 * MIB + 7):
            assert os.pread(fd, 100_000, offset) == DATA[offset : offset + 100_000]
    assert [one for one in rig.requests(image_id) if one.path.endswith("/file")] == []
    assert report(mount, image_id)["source"] == "ranged"
    assert 0 < status(mount)["fetched_bytes"] < SIZE


def break_off(front: MisbehavingFront, _held: threading.Event) -> None:
    front.on().respond(answers.cut(after=200_000))


def hang(front: MisbehavingFront, held: threading.Event) -> None:
    front.on().respond(answers.hang(held))


def go_away(front: MisbehavingFront, _held: threading.Event) -> None:
    front.on().respond(answers.reset())


@pytest.mark.parametrize("fail", [go_away, hang, break_off])
def test_a_store_that_fails(site: Site, fail: Callable[[MisbehavingFront, threading.Event], None]) -> None:
    """[S2203] A store that is away, hangs or breaks off costs no read: the bytes come from the next source in the
    same read, and from the store again once it answers.
    """
    image_id, held = site.new(), threading.Event()
    site.read(image_id, 0, 4096)
    assert site.glance_sent(image_id) == 0
    fail(site.front, held)
    site.read(image_id, 2 * MIB, 2 * MIB)
    assert site.glance_sent(image_id) > 0
    site.front.behave()
    held.set()
    eventually(lambda: all(one["state"] == "answers" for one in status(site.mount)["stores"]), 40)
    other = site.new()
    site.read(other)
    assert site.glance_sent(other) == 0


def test_glance_away(site: Site) -> None:
    """[S2204] While Glance is away an image that a store has is read on."""
    image_id = site.new()
    site.read(image_id, 0, 4096)
    site.glance.on().respond(answers.reset())
    with suppress(OSError):
        os.stat(site.mount.mountpoint / ("0" * 40))  # whoever asks Glance finds out
    try:
        eventually(lambda: status(site.mount)["endpoints"]["glance"]["state"] == "away", 30)
        site.read(image_id)
    finally:
        site.glance.behave()
    eventually(lambda: status(site.mount)["endpoints"]["glance"]["state"] == "answers", 30)


def test_glance_away_and_a_new_server(site: Site) -> None:
    """[S2212] An image that a store has is read on from there also when the server is killed while Glance is away."""
    image_id = site.new()
    site.read(image_id, 0, 4096)
    # Within a second they are in the state database (or in its log), and outlive the server.
    location = f"{site.front.url}/{image_id}".encode()
    eventually(lambda: any(location in file.read_bytes() for file in site.mount.cache_dir.glob("state.sqlite*")))
    site.glance.on().respond(answers.reset())
    try:
        with opened(site.mount.path(image_id)):
            os.kill(server_pid(site.mount), signal.SIGKILL)
            site.read(image_id)
            assert site.mount.image(image_id)["read_from"] == "http"
            assert site.glance_sent(image_id) == 0
    finally:
        site.glance.behave()
    eventually(lambda: status(site.mount)["endpoints"]["glance"]["state"] == "answers", 30)


@pytest.mark.glance
def test_a_file_on_this_host(rig: Rig, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings) -> None:
    """[S2205] An image whose file in Glance's file store is on this host is read from that file; nothing of it is
    fetched or kept but what the checks read.

    [S2206] An image that is read in place is read on when its file is deleted or replaced, and after the server was
    killed.
    """
    expected_warnings(r"died \(signal SIGKILL\)")
    image_id = rig.upload(DATA, "in a file")
    file = Path(rig.data_path(image_id))
    mount = basefs_mount(rig, {"file_location.directories": file.parent})
    with opened(mount.path(image_id)) as fd:
        eventually(lambda: report(mount, image_id)["state"] == "in place")
        before = len([one for one in rig.requests(image_id) if one.path.endswith("/file")])
        assert os.pread(fd, SIZE, 0) == DATA
        assert len([one for one in rig.requests(image_id) if one.path.endswith("/file")]) == before
        assert report(mount, image_id)["cached_bytes"] <= 2 * MIB
        assert report(mount, image_id)["sources"][0]["state"] == "in place"
        file.rename(file.with_suffix(".kept"))
        file.write_bytes(bytes(SIZE))
        os.kill(server_pid(mount), signal.SIGKILL)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, SIZE, 0) == DATA
        assert report(mount, image_id)["state"] == "in place"
        file.unlink()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, SIZE, 0) == DATA
        file.with_suffix(".kept").rename(file)


def test_hostile_locations(site: Site) -> None:
    """[S2207] A location that is not allowed is neither asked nor opened; `basefs image show` says why, and no key in
    it is told or logged.
    """
    image_id = site.new()
    host = site.front.url.partition("//")[2]
    site.glance.glance.locations[image_id] = [
        f"http://user:{SECRET}@{host}/{image_id}",
        f"http://169.254.169.254/latest/meta-data?key={SECRET}",
        f"http://localhost:{host.partition(':')[2]}/{image_id}",
        "file:///etc/shadow",
        f"s3+https://KEY:{SECRET}@s3.example/bucket/{image_id}",
        f"gopher://{SECRET}@{host}/",
    ]
    site.read(image_id)
    assert site.web_was_asked(image_id) == 0
    told = report(site.mount, image_id)["sources"]
    assert [(one["source"], one["state"]) for one in told] == [
        ("file", "refused"), ("s3", "refused"), ("http", "refused"), ("http", "refused"), ("http", "refused"),
    ]  # fmt: skip
    assert SECRET not in str(told)
    assert SECRET not in site.mount.log_text


@pytest.mark.parametrize("spoil", ["size", "start"])
def test_another_object(site: Site, spoil: str) -> None:
    """[S2208] An object of another size than the image, or that begins with other bytes, is not read."""
    image_id = site.new()
    locations = site.glance.glance.locations.pop(image_id)
    if spoil == "size":
        site.web.put(f"/{image_id}", DATA[:-1])
    else:
        site.web.put(f"/{image_id}", bytes([DATA[0] ^ 1]) + DATA[1:])
        # Seen first through Glance; a server that is new to the image asks for locations again.
        site.read(image_id, 0, 4096)
        os.kill(server_pid(site.mount), signal.SIGKILL)
    site.glance.glance.locations[image_id] = locations
    site.read(image_id)
    assert site.web_was_asked(image_id) == (1 if spoil == "size" else 2)
    assert "is not read from http at 127.0.0.1" in site.mount.log_text


def test_wrong_bytes(site: Site) -> None:
    """[S2209] An image whose bytes turn out to have another hash than Glance tells is fetched again, and from then on
    read, through Glance only.
    """
    image_id = site.new()
    site.web.put(f"/{image_id}", DATA[: 3 * MIB] + bytes([DATA[3 * MIB] ^ 1]) + DATA[3 * MIB + 1 :])
    site.mount.cli("image", "warm", image_id)
    told = report(site.mount, image_id)
    assert (told["whole"], told["sources"][-1]["state"]) == ("verified", "only")
    asked = site.web_was_asked(image_id)
    site.read(image_id)
    site.mount.cli("image", "evict", image_id)
    site.read(image_id)
    assert site.web_was_asked(image_id) == asked


def test_where_it_was_read(site: Site) -> None:
    """[S2210] `basefs image show` and the extended attribute `user.basefs.source` say where an image was read last."""
    image_id = site.new()
    site.read(image_id, 0, 4096)
    assert source_of(site.mount, image_id) == (
        f"ranged: http at {site.front.url.partition('//')[2]} answered a Range with exactly its bytes"
    )
    shown = report(site.mount, image_id)
    assert (shown["read_from"], shown["sources"][0]["state"]) == ("http", "read")
    table = site.mount.cli("image", "show", image_id).stdout
    assert "http at 127.0.0.1" in table

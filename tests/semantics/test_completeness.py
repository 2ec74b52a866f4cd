"""docs/SEMANTICS.md, section 16: images in use are completed and verified, and wrong bytes are quarantined."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import errno_of, eventually, front_mount, opened, report, status, wait_for_images
from tools.mount import BasefsMount, base_name
from tools.soak.killer import signal_server

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE = 12 * MIB + 5
DATA = Random(16).randbytes(SIZE)
SMALL = DATA[: 2 * MIB + 7]
OPTIONS = {
    "hydrate_concurrency_max": 2,
    "hydrate_delay_s": 0.2,
    "graduate": False,
    "other_io_deadline_s": 4.0,
    "catalog_refresh_s": 0.3,
}
IS_WRONG = "nothing of it is served until all of it was fetched again"
EXPECTED = (IS_WRONG, "quarantined: its bytes", "read answered EIO.*did not have the hash", "server .* died")


@pytest.fixture(scope="module")
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        for n in range(8):
            running.glance.add(DATA if n < 3 else SMALL, name=f"image {n}")
        yield running


@pytest.fixture(scope="module")
def mount(front: MisbehavingFront, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    with front_mount(front, tmp_path_factory.mktemp("complete") / "basefs", OPTIONS, EXPECTED) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def large(front: MisbehavingFront) -> Iterator[str]:
    return iter([image_id for image_id, data in front.glance.data.items() if data is DATA])


@pytest.fixture(scope="module")
def small(front: MisbehavingFront) -> Iterator[str]:
    return iter([image_id for image_id, data in front.glance.data.items() if data is SMALL])


@pytest.fixture
def lying(front: MisbehavingFront) -> Iterator[Callable[[str, int], None]]:
    """`lying(image_id, times)`: so many of the next answers with bytes of it are wrong; its end is the test's."""

    def lie(image_id: str, times: int) -> None:
        front.on(f"/{image_id}/file").respond(answers.other_bytes(), times=times)

    yield lie
    front.behave()


def bytes_asked(front: MisbehavingFront, image_id: str, since: int = 0) -> int:
    """By ranged requests for the image's bytes, from the `since`-th one on."""
    ranges = [request.range for request in front.requests(f"/{image_id}/file")[since:]]
    return sum(last - first + 1 for first, last in filter(None, ranges))


def test_images_in_use_are_completed_and_verified(
    front: MisbehavingFront, mount: BasefsMount, large: Iterator[str]
) -> None:
    """[S1601] An image that is open, pinned, or the base of an overlay is brought here whole in the background,
    `hydrate_delay_s` after its first use; one that nobody uses is not.

    [S1604] Once all of an image is here, its bytes are compared with the hash that Glance tells.
    """
    image_id = next(large)
    path = mount.path(image_id)
    path.stat()
    others = status(mount)["cache_bytes"]
    with opened(path) as fd:
        eventually(lambda: report(mount, image_id)["state"] == "verified")
        before = front.count(f"/{image_id}/file")
        assert os.pread(fd, SIZE, 0) == DATA
        assert front.count(f"/{image_id}/file") == before
    assert bytes_asked(front, image_id) == SIZE
    assert status(mount)["cache_bytes"] - others <= SIZE, "of no other image anything"
    assert status(mount)["hydrated_bytes"] > SIZE // 2


def test_readers_go_first(front: MisbehavingFront, mount: BasefsMount, large: Iterator[str]) -> None:
    """[S1602] Nothing is begun in the background while a read waits for bytes from Glance."""
    image_id, read_id = next(large), next(large)
    release = threading.Event()
    mount.path(image_id).stat()
    with opened(mount.path(read_id)) as fd:
        front.on(f"/{read_id}/file").respond(answers.hang(release), times=1)
        reader = threading.Thread(target=lambda: os.pread(fd, 4096, SIZE - 4096))
        reader.start()
        eventually(lambda: front.count(f"/{read_id}/file") == 2)
        before = front.count(f"/{image_id}/file")
        with opened(mount.path(image_id)):
            eventually(lambda: report(mount, image_id)["state"] == "hydrating")
            assert front.count(f"/{image_id}/file") == before
            assert front.count(f"/{read_id}/file") == 2
            release.set()
            reader.join()
            eventually(lambda: report(mount, image_id)["state"] == "verified")


def test_a_kill_costs_what_was_on_its_way(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    """[S1603] When the server is killed the next one goes on with what it was bringing, also for nova's pre-cache call,
    and fetches nothing that is here.
    """
    expected_warnings(r"basefs.keeper server \d+ died")
    image_id = front.glance.add(DATA, name="killed")
    mount = basefs_mount(front.conf_lines(), OPTIONS)
    wait_for_images(mount, 1)
    path = mount.path(image_id)
    eventually(path.exists)
    front.on(f"/{image_id}/file").respond(answers.slow(4e6))
    os.utime(path)
    eventually(lambda: report(mount, image_id)["cached_bytes"] > 4 * MIB)
    signal_server(mount, 9)
    here = report(mount, image_id)["cached_bytes"]
    asked = front.count(f"/{image_id}/file")
    front.behave()
    eventually(lambda: report(mount, image_id)["state"] == "verified")
    assert bytes_asked(front, image_id, since=asked) <= SIZE - here + 8 * MIB, "at most what was on its way"
    assert path.read_bytes() == DATA


def test_wrong_bytes_are_fetched_again_and_right_ones_are_served(
    front: MisbehavingFront, mount: BasefsMount, small: Iterator[str], lying: Callable[[str, int], None]
) -> None:
    """[S1605] Of an image whose bytes together have another hash nothing is served until all of them were fetched again
    and are right; reads wait for that until their deadline.
    """
    image_id = next(small)
    path = mount.path(image_id)
    path.stat()
    lying(image_id, 1)
    with opened(path) as fd:
        eventually(lambda: report(mount, image_id)["state"] == "verified")
        assert "nothing of it is served" in mount.log_text
        assert os.pread(fd, len(SMALL), 0) == SMALL
    assert report(mount, image_id)["fetched_bytes"] == len(SMALL) * 2


def test_an_image_that_stays_wrong_is_quarantined(
    front: MisbehavingFront, mount: BasefsMount, small: Iterator[str], lying: Callable[[str, int], None]
) -> None:
    """[S1606] An image whose bytes are wrong twice is quarantined: every read of it answers EIO at once; its name stays
    as long as it is in use, and is ENOENT after that.

    [S1607] A quarantine outlives a restart, and ends with `basefs image evict`, also of an open image, or with another
    hash in Glance.
    """
    image_id, other_id = next(small), next(small)
    for one in (image_id, other_id):
        mount.path(one).stat()
        lying(one, 100)
    with opened(mount.path(image_id)) as fd, opened(mount.path(other_id)) as other_fd:
        for one in (image_id, other_id):
            eventually(lambda one=one: report(mount, one)["state"] == "quarantined")
        for _restart in range(2):
            assert errno_of(lambda: os.pread(fd, 4096, 0)) == "EIO"
            assert mount.path(image_id).exists()
            signal_server(mount, 9)
            # What changed less than a second before a kill is found out once more, while the front still lies.
            for one in (image_id, other_id):
                eventually(lambda one=one: report(mount, one)["state"] == "quarantined")
        front.behave()
        mount.cli("image", "evict", image_id)
        eventually(lambda: errno_of(lambda: os.pread(fd, 4096, 0)) is None)
        assert os.pread(fd, len(SMALL), 0) == SMALL
        eventually(lambda: report(mount, image_id)["state"] == "verified")
        assert errno_of(lambda: os.pread(other_fd, 4096, 0)) == "EIO"
    eventually(lambda: not mount.path(other_id).exists())
    assert "fetched twice" in report(mount, other_id)["refused_reason"]
    front.glance.change(other_id, checksum="0" * 32)
    eventually(lambda: mount.path(other_id).exists())
    assert mount.path(other_id).read_bytes() == SMALL


def test_the_base_of_an_overlay_keeps_its_name(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    """[S1606] An image whose bytes are wrong twice is quarantined: every read of it answers EIO at once; its name stays
    as long as it is in use, and is ENOENT after that.
    """
    expected_warnings(IS_WRONG)
    expected_warnings("quarantined: its bytes")
    expected_warnings("read answered EIO")
    image_id = front.glance.add(SMALL, name="base")
    mount = basefs_mount(front.conf_lines(), OPTIONS, start=False)
    overlay_on(mount, image_id)
    front.on(f"/{image_id}/file").respond(answers.other_bytes())
    mount.start()
    eventually(lambda: mount.path(image_id).exists())
    eventually(lambda: report(mount, image_id)["state"] == "quarantined")
    front.behave()
    assert errno_of(lambda: mount.path(image_id).read_bytes()) == "EIO"
    assert mount.path(image_id).exists()


def overlay_on(mount: BasefsMount, image_id: str) -> Path:
    """An instance whose disk has the image as its base."""
    disk = mount.instances_path / "11111111-2222-3333-4444-555555555555" / "disk"
    disk.parent.mkdir()
    base = mount.mountpoint / base_name(image_id)
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", str(base), str(disk), str(len(SMALL))]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return disk


def test_only_verified_images_are_shown_where_that_is_required(
    front: MisbehavingFront, basefs_mount: MountFactory
) -> None:
    """[S1608] With `require_verified` an image that is not in use is ENOENT until all of it is here and has the hash
    that Glance tells; `basefs image warm` brings it. Once it was evicted it is ENOENT again.
    """
    image_id, unhashed_id = (
        front.glance.add(SMALL),
        front.glance.add(SMALL, checksum=None, os_hash_algo=None, os_hash_value=None),
    )
    mount = basefs_mount(front.conf_lines(), {"require_verified": True})
    wait_for_images(mount, 2)
    path = mount.path(image_id)
    assert errno_of(path.stat) == "ENOENT"
    assert path.name not in os.listdir(mount.mountpoint)
    assert "basefs image warm" in report(mount, image_id)["refused_reason"]
    mount.cli("image", "warm", image_id)
    assert path.read_bytes() == SMALL
    assert path.name in os.listdir(mount.mountpoint)
    mount.cli("image", "evict", image_id)
    assert errno_of(path.read_bytes) == "ENOENT"  # at once, though the kernel may know its name for a second
    mount.cli("upgrade")
    assert errno_of(path.read_bytes) == "ENOENT"
    eventually(lambda: errno_of(path.stat) == "ENOENT")
    assert report(mount, image_id)["cached_bytes"] == 0
    mount.cli("image", "warm", unhashed_id)
    assert errno_of(mount.path(unhashed_id).stat) == "ENOENT"
    assert "Glance tells no hash" in report(mount, unhashed_id)["refused_reason"]

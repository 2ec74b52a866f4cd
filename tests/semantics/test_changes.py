"""docs/SEMANTICS.md, sections 7 and 8."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from random import Random

import pytest

from tests.conftest import ExpectedWarnings
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import IMAGE_BYTES, Image, errno_of, eventually, opened, report, wait_for_images
from tests.semantics.test_lower import RENAME_EXCHANGE, rename_with
from tools.mount import BasefsMount
from tools.rig import Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance]


def test_utime(image: Image) -> None:
    """[S701] utime of an image is accepted, any time, and shown."""
    for atime_ns, mtime_ns in (
        (0, 0),
        (1, 2),
        (1_700_000_000_123_456_789, 1_600_000_000_987_654_321),
        (2**33 * 10**9, 2**33 * 10**9 + 1),
        (-(10**9), -(10**9)),
    ):
        os.utime(image.path, ns=(atime_ns, mtime_ns))
        assert (image.path.stat().st_atime_ns, image.path.stat().st_mtime_ns) == (atime_ns, mtime_ns)
    os.utime(image.path)
    assert image.path.stat().st_mtime > 1_700_000_000


def test_owner_and_mode(image: Image) -> None:
    """[S702] chown and chmod of an image are accepted and shown."""
    os.chown(image.path, 64055, -1)
    assert (image.path.stat().st_uid, image.path.stat().st_gid) == (64055, image.mount.mountpoint.stat().st_gid)
    os.chown(image.path, -1, 108)
    image.path.chmod(0o440)
    shown = image.path.stat()
    assert (shown.st_uid, shown.st_gid, stat.S_IMODE(shown.st_mode)) == (64055, 108, 0o440)
    assert stat.S_ISREG(shown.st_mode)


def test_utime_hydrates(image: Image) -> None:
    """[S704] utime of an image without local state brings the whole image here in the background."""
    os.utime(image.path)
    eventually(lambda: image.report()["state"] == "verified")
    assert image.report()["cached_bytes"] == IMAGE_BYTES


def test_chown_and_chmod_are_no_use(image: Image) -> None:
    """[S705] chown and chmod give an image no local state and fetch nothing."""
    image.path.stat()
    before = image.report()
    os.chown(image.path, 64055, 108)
    image.path.chmod(0o444)
    after = image.report()
    assert after == before
    assert after["state"] == "cold"
    assert not image.is_listed_for_nova()


def test_truncate(image: Image) -> None:
    """[S706] truncate of an image, to any size, answers EROFS."""
    for size in (0, 1, IMAGE_BYTES - 1, IMAGE_BYTES, IMAGE_BYTES + 1):
        assert errno_of(lambda size=size: os.truncate(image.path, size)) == "EROFS"
    assert image.path.read_bytes() == image.content


def test_unlink(image: Image) -> None:
    """[S801] unlink of an image succeeds and drops its bytes from this node.

    [S802] After unlink the name of an image still resolves, its bytes are fetched again when they are read, and Glance
    has the image as before.
    """
    assert image.path.read_bytes() == image.content
    image.path.unlink()
    assert image.report()["cached_bytes"] == 0
    assert image.report()["status"] == "active"
    fetched = image.report()["fetched_bytes"]
    assert image.path.stat().st_size == IMAGE_BYTES
    eventually(lambda: image.path.stat().st_blocks == 0)
    with opened(image.path, os.O_RDONLY | os.O_DIRECT) as fd:
        assert os.pread(fd, IMAGE_BYTES, 0) == image.content
    assert image.report()["fetched_bytes"] >= fetched + IMAGE_BYTES


def test_unlink_of_images_nobody_has_used(image: Image) -> None:
    """[S801] unlink of an image succeeds and drops its bytes from this node."""
    for _ in range(3):
        image.path.unlink()
    assert image.report()["cached_bytes"] == 0


def test_unlink_while_open(new_image: Callable[[], Image]) -> None:
    """[S803] An image that is unlinked while open stays readable, and what is here of it stays until the last close,
    which drops it.

    [S804] An image that is opened again between unlink and the last close keeps its bytes.
    """
    dropped, kept = new_image(), new_image()
    for image in (dropped, kept):
        with opened(image.path, os.O_RDONLY | os.O_DIRECT) as first, opened(image.path) as second:
            assert os.pread(first, 1 << 20, 0) == image.content[: 1 << 20]
            image.path.unlink()
            here = image.report()["cached_bytes"]
            assert here >= 1 << 20
            assert os.pread(first, IMAGE_BYTES, 0) == os.pread(second, IMAGE_BYTES, 0) == image.content
            assert os.fstat(first).st_size == IMAGE_BYTES
            if image is kept:
                image.path.open("rb").close()
    eventually(lambda: dropped.report()["cached_bytes"] == 0)
    eventually(lambda: kept.report()["open_handles"] == 0)
    assert kept.report()["cached_bytes"] == IMAGE_BYTES


def test_unlink_ends_the_local_state(image: Image) -> None:
    """[S805] unlink ends the local state of an image: its mtime is the present again and `nova_user` is not shown it.

    [S808] Owner and mode of an image outlive unlink.
    """
    os.utime(image.path, ns=(0, 0))
    os.chown(image.path, 64055, 108)
    image.path.chmod(0o640)
    assert image.is_listed_for_nova()
    image.path.unlink()
    assert not image.is_listed_for_nova()
    shown = image.path.stat()
    assert shown.st_mtime > 1_700_000_000
    assert (shown.st_uid, shown.st_gid, stat.S_IMODE(shown.st_mode)) == (64055, 108, 0o640)


@pytest.fixture
def slow_front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        yield running


def test_unlink_stops_hydration(
    slow_front: MisbehavingFront, basefs_mount: Callable[..., BasefsMount], expected_warnings: ExpectedWarnings
) -> None:
    """[S806] unlink of an image that is being brought here in the background stops that.

    [S807] unlink of an image succeeds also when its local bytes cannot be removed.
    """
    expected_warnings("its local bytes were not removed")
    expected_warnings("serving it round the cache: .*Is a directory")
    data = Random(6).randbytes(20_000_000)
    image_id, stuck_id = slow_front.glance.add(data), slow_front.glance.add(data[:100_000])
    mount = basefs_mount(slow_front.conf_lines())
    wait_for_images(mount, 2)
    path = mount.path(image_id)
    path.stat()
    slow_front.on("/file").respond(answers.slow(1_000_000))
    os.utime(path)
    eventually(lambda: report(mount, image_id)["state"] == "hydrating")
    path.unlink()
    eventually(lambda: report(mount, image_id)["state"] == "cold")
    assert report(mount, image_id)["cached_bytes"] == 0
    slow_front.behave()

    stuck = mount.path(stuck_id)
    assert stuck.read_bytes() == data[:100_000]
    eventually(lambda: report(mount, stuck_id)["open_handles"] == 0)
    (in_the_way,) = (
        path for path in (mount.cache_dir / "chunks").glob("*.map") if stuck_id.encode() in path.read_bytes()
    )
    in_the_way.unlink()
    in_the_way.mkdir()
    stuck.unlink()
    assert stuck.read_bytes() == data[:100_000]
    in_the_way.rmdir()


def test_rename(image: Image) -> None:
    """[S809] rename of an image, or an exchange with one, answers EROFS."""
    other = image.path.with_name("exchanged")
    other.write_bytes(b"lower")
    for attempt in (
        lambda: image.path.rename(image.path.with_name("renamed")),
        lambda: image.path.rename(other),
        lambda: rename_with(image.path, other, RENAME_EXCHANGE),
        lambda: rename_with(other, image.path, RENAME_EXCHANGE),
    ):
        assert errno_of(attempt) == "EROFS"
    assert other.read_bytes() == b"lower"
    assert image.path.read_bytes() == image.content
    other.unlink()


def test_link(image: Image) -> None:
    """[S810] link of an image answers ENOTSUP."""
    linked = image.path.with_name("linked")
    assert errno_of(lambda: os.link(image.path, linked)) == errno.errorcode[errno.ENOTSUP]
    assert not linked.exists()


def test_unlink_leaves_glance_alone(rig: Rig, image: Image) -> None:
    """[S802] After unlink the name of an image still resolves, its bytes are fetched again when they are read, and
    Glance has the image as before.
    """
    image.path.read_bytes()
    image.path.unlink()
    assert image.path.exists()
    assert rig.api().get(image.id)["status"] == "active"
    assert {request.method for request in rig.requests(image.id)} == {"GET"}

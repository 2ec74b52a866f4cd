"""docs/SEMANTICS.md, sections 5 and 6; what happens without Glance is in test_glance_away.py."""

import contextlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from basefs.mounts import mount_at
from tests.semantics.conftest import IMAGE_BYTES, NOVA, Image, errno_of, opened, run_as, status

pytestmark = [pytest.mark.mount, pytest.mark.glance]

END = IMAGE_BYTES
SPOTS = [
    (0, 1), (1, 1), (511, 2), (4095, 2), (65_535, 2), (65_536, 65_536), (131_071, 300_000), (1 << 20, 1),
    ((1 << 20) - 1, 1 << 20), (2_000_003, 999_998), (END - 1, 1), (0, END), (END - 65_536, 65_536), (7, 0),
]  # fmt: skip


def test_writing_is_refused(image: Image) -> None:
    """[S502] open for writing, reading and writing, or with O_TRUNC, of an image answers EROFS to root, whatever else
    is in the flags.
    """
    for access in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC):
        for more in (0, os.O_APPEND, os.O_CREAT, os.O_DIRECT, os.O_SYNC, os.O_NONBLOCK):
            assert errno_of(lambda flags=access | more: os.open(image.path, flags)) == "EROFS"
    assert image.path.read_bytes() == image.content


def test_flags_are_accepted(image: Image) -> None:
    """[S503] O_DIRECT, O_NONBLOCK, O_NOFOLLOW, O_CLOEXEC, O_NOATIME, and O_CREAT without O_EXCL, are accepted when an
    image is opened for reading.
    """
    every = (os.O_DIRECT, os.O_NONBLOCK, os.O_NOFOLLOW, os.O_CLOEXEC, os.O_NOATIME, os.O_CREAT)
    for flags in (*every, sum(every)):
        with opened(image.path, os.O_RDONLY | flags) as fd:
            assert os.pread(fd, 4096, 8192) == image.content[8192:12_288]


def test_everybody_reads(image: Image) -> None:
    """[S504] Users other than the one that mounted read images as the mode says."""
    seen = run_as(NOVA, image.mount.mountpoint, "head", "-c", "1000", image.name)
    assert seen.stdout == image.content[:1000]
    image.path.chmod(0o600)
    assert run_as(NOVA, image.mount.mountpoint, "head", "-c", "1", image.name).returncode != 0


def test_mount_options(image: Image) -> None:
    """[S505] The mount is nosuid, nodev and noexec."""
    mount = mount_at(image.mount.mountpoint)
    assert mount is not None
    assert {"nosuid", "nodev", "noexec"} <= set(mount.options.split(","))


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["page cache", "O_DIRECT"])
def test_any_offset_and_size(image: Image, flags: int) -> None:
    """[S601] A read of an image gives exactly the bytes of the image at that offset, whatever offset and size, cold or
    cached, by however many readers at once.

    [S603] Reads with O_DIRECT give the same bytes, also at offsets and sizes that are not aligned.
    """
    rng = Random(5)
    spots = [*SPOTS, *((rng.randrange(END), rng.randrange(1, 400_000)) for _ in range(40))]
    with contextlib.ExitStack() as stack:
        fds = [stack.enter_context(opened(image.path, flags)) for _ in range(4)]

        def is_right(work: tuple[int, tuple[int, int]]) -> bool:
            fd, (offset, size) = work
            return os.pread(fd, size, offset) == image.content[offset : offset + size]

        for _ in ("cold", "cached"):
            work = [(fd, spot) for fd in fds for spot in rng.sample(spots, len(spots))]
            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(is_right, work))


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["page cache", "O_DIRECT"])
def test_the_end(image: Image, flags: int) -> None:
    """[S602] A read that crosses the end of an image gives the bytes up to the end; one at or past the end gives
    none.
    """
    with opened(image.path, flags) as fd:
        assert os.pread(fd, 1 << 20, END - 100_001) == image.content[-100_001:]
        assert os.pread(fd, 4096, END - 1) == image.content[-1:]
        for offset in (END, END + 1, END + (1 << 20), 1 << 40):
            assert os.pread(fd, 4096, offset) == b""


def test_mappings(image: Image) -> None:
    """[S604] A mapping of an image, private or shared, shows the same bytes."""
    image.mount.cli("image", "warm", image.id)  # a page fault on a cold image would wait with the GIL held
    with opened(image.path) as fd:
        for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
            with mmap.mmap(fd, 0, flags=flags, prot=mmap.PROT_READ) as view:
                assert view[:] == image.content


def test_copies_by_the_kernel(image: Image) -> None:
    """[S605] sendfile and copy_file_range from an image copy the same bytes."""
    target = image.path.with_name("copy")
    for copy in (copy_by_sendfile, copy_by_range):
        with opened(image.path) as source, opened(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as sink:
            copy(source, sink)
        assert target.read_bytes() == image.content
    target.unlink()


def copy_by_sendfile(source: int, sink: int) -> None:
    while os.sendfile(sink, source, None, 700_001):
        pass


def copy_by_range(source: int, sink: int) -> None:
    while os.copy_file_range(source, sink, 700_001):
        pass


def test_no_holes(image: Image) -> None:
    """[S606] SEEK_DATA and SEEK_HOLE see an image as one piece of data."""
    with opened(image.path) as fd:
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 2_000_000, os.SEEK_DATA) == 2_000_000
        assert os.lseek(fd, 5, os.SEEK_HOLE) == END
        assert errno_of(lambda: os.lseek(fd, END, os.SEEK_DATA)) == "ENXIO"


def test_pages_are_kept(new_image: Callable[[], Image]) -> None:
    """[S607] Pages of an image that the kernel has are used again by the next open: reading it again asks basefs for
    nothing.
    """
    image = new_image()
    assert image.path.read_bytes() == image.content
    before = status(image.mount)["fuse_requests"]["read"]
    for _ in range(3):
        assert image.path.read_bytes() == image.content
    # One read of status.json may be counted.
    assert status(image.mount)["fuse_requests"]["read"] - before <= 2

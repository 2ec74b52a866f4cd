"""Random operations on images through a mount and on a model of them: every answer is the model's, every byte right."""

import os
import signal
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from basefs.control.client import ControlClient
from basefs.errors import ControlError
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import NOVA, errno_of, eventually, front_mount, listing_as, report, status
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

EXAMPLES = 6
STEPS = 60
SIZES = (3_000_001, 2_097_152, 70_000)
HANDLES_MAX = 5
REMEMBERED_S = 1.5
"""The kernel answers from memory for 1 s."""
MAY_LOG = (r"server \d+ died \(signal SIGKILL\)",)

images = st.integers(0, len(SIZES) - 1)
slots = st.integers(0, HANDLES_MAX - 1)
offsets = st.one_of(
    st.integers(0, max(SIZES) + 10_000), st.sampled_from((0, 4096, 65_535, 65_536, 1 << 20, (1 << 20) - 1, 2_097_151))
)
lengths = st.one_of(st.integers(0, 200_000), st.sampled_from((1, 4096, 65_536, 1 << 20, 4_000_000)))
open_flags = st.sampled_from((os.O_RDONLY, os.O_RDONLY | os.O_DIRECT, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW))
ids = st.one_of(st.none(), st.integers(0, 2**31))
times_ns = st.integers(-(2**31) * 10**9, 2**33 * 10**9)


@dataclass
class Model:
    """What is to be seen of one image."""

    id: str
    path: Path
    content: bytes = field(repr=False)
    inode: int = 0
    uid: int = 0
    gid: int = 0
    mode: int = 0o644
    used: tuple[float, float] | None = None
    """Between which times it was first used; None: no local state."""
    atime_ns: int | None = None
    mtime_ns: int | None = None
    dropped_at_close: bool = False

    def use(self, begun: float) -> None:
        if self.used is None:
            self.used = (begun, time.time())

    def forget(self) -> None:
        self.used = self.atime_ns = self.mtime_ns = None

    def fits(self, shown: os.stat_result) -> bool:
        assert (shown.st_ino, shown.st_size, shown.st_nlink) == (self.inode, len(self.content), 1)
        assert stat.S_ISREG(shown.st_mode)
        assert 0 <= shown.st_blocks <= -(-len(self.content) // 512)
        if (shown.st_uid, shown.st_gid, stat.S_IMODE(shown.st_mode)) != (self.uid, self.gid, self.mode):
            return False
        if self.atime_ns is not None and shown.st_atime_ns != self.atime_ns:
            return False
        if self.mtime_ns is not None:
            return shown.st_mtime_ns == self.mtime_ns
        now = time.time()
        begun, ended = self.used or (now - REMEMBERED_S, now)
        return begun - 0.1 <= shown.st_mtime <= ended + 0.1


class ImagesModel(RuleBasedStateMachine):
    front: MisbehavingFront
    mount: BasefsMount
    pool: Iterator[str]

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Model] = []
        self.handles: dict[int, tuple[int, Model]] = {}
        self.kills = self.restarts = 0
        self.control = ControlClient(self.mount.directory / "control.sock")

    @initialize()
    def take_cold_images(self) -> None:
        owner = self.mount.mountpoint.stat()
        for _ in SIZES:
            image_id = next(self.pool)
            path = self.mount.path(image_id)
            image = Model(id=image_id, path=path, content=self.front.glance.data[image_id])
            image.inode, image.uid, image.gid = path.stat().st_ino, owner.st_uid, owner.st_gid
            self.images.append(image)

    def is_open(self, image: Model) -> bool:
        return any(of is image for _, of in self.handles.values())

    # --- reading ------------------------------------------------------------------------------------------

    @rule(image=images, slot=slots, flags=open_flags)
    def open(self, image: int, slot: int, flags: int) -> None:
        if slot not in self.handles:
            begun = time.time()
            self.handles[slot] = (os.open(self.images[image].path, flags), self.images[image])
            self.images[image].use(begun)
            self.images[image].dropped_at_close = False

    @rule(slot=slots)
    def close(self, slot: int) -> None:
        if slot in self.handles:
            fd, image = self.handles.pop(slot)
            os.close(fd)
            if image.dropped_at_close and not self.is_open(image):
                image.dropped_at_close = False
                eventually(lambda: report(self.mount, image.id)["cached_bytes"] == 0)

    @rule(slot=slots, offset=offsets, length=lengths)
    def read(self, slot: int, offset: int, length: int) -> None:
        if slot in self.handles:
            fd, image = self.handles[slot]
            assert os.pread(fd, length, offset) == image.content[offset : offset + length]

    @rule(spots=st.lists(st.tuples(offsets, lengths), min_size=2, max_size=6))
    def read_by_all_handles_at_once(self, spots: list[tuple[int, int]]) -> None:
        work = [(fd, image, *spot) for fd, image in self.handles.values() for spot in spots]
        with ThreadPoolExecutor(6) as pool:
            read = pool.map(lambda one: os.pread(one[0], one[3], one[2]), work)
            for data, (_, image, offset, length) in zip(read, work, strict=True):
                assert data == image.content[offset : offset + length]

    @rule(image=images)
    def read_whole(self, image: int) -> None:
        begun = time.time()
        assert self.images[image].path.read_bytes() == self.images[image].content
        self.images[image].use(begun)
        self.images[image].dropped_at_close = False

    # --- attributes ---------------------------------------------------------------------------------------

    @rule(image=images)
    def stat(self, image: int) -> None:
        eventually(lambda: self.images[image].fits(self.images[image].path.stat()), 5 * REMEMBERED_S)

    @rule(image=images, atime_ns=times_ns, mtime_ns=times_ns)
    def utime(self, image: int, atime_ns: int, mtime_ns: int) -> None:
        begun = time.time()
        os.utime(self.images[image].path, ns=(atime_ns, mtime_ns))
        self.images[image].use(begun)
        self.images[image].atime_ns, self.images[image].mtime_ns = atime_ns, mtime_ns

    @rule(image=images, uid=ids, gid=ids)
    def chown(self, image: int, uid: int | None, gid: int | None) -> None:
        os.chown(self.images[image].path, -1 if uid is None else uid, -1 if gid is None else gid)
        self.images[image].uid = self.images[image].uid if uid is None else uid
        self.images[image].gid = self.images[image].gid if gid is None else gid

    @rule(image=images, mode=st.integers(0, 0o777))
    def chmod(self, image: int, mode: int) -> None:
        self.images[image].path.chmod(mode)
        self.images[image].mode = mode

    @rule()
    def list_as_nova(self) -> None:
        listed = set(listing_as(NOVA, self.mount.mountpoint))
        assert [image.path.name in listed for image in self.images] == [bool(image.used) for image in self.images]

    @rule(image=images)
    def change_what_cannot_be(self, image: int) -> None:
        path = self.images[image].path
        assert errno_of(lambda: os.truncate(path, 5)) == "EROFS"
        assert errno_of(lambda: os.open(path, os.O_RDWR)) == "EROFS"
        assert errno_of(lambda: path.rename(path.with_name("other"))) == "EROFS"

    # --- what is here -------------------------------------------------------------------------------------

    @rule(image=images)
    def unlink(self, image: int) -> None:
        one = self.images[image]
        one.path.unlink()
        one.forget()
        if self.is_open(one):
            one.dropped_at_close = True
        else:
            eventually(lambda: report(self.mount, one.id)["cached_bytes"] == 0)

    @rule(image=images)
    def evict(self, image: int) -> None:
        one = self.images[image]
        if self.is_open(one):
            with pytest.raises(ControlError, match="open"):
                self.control.evict(one.id)
        else:
            eventually(lambda: self.is_evicted(one))  # RELEASE comes after close(2) has returned
            one.forget()
            assert report(self.mount, one.id)["cached_bytes"] == 0

    def is_evicted(self, image: Model) -> bool:
        try:
            self.control.evict(image.id)
        except ControlError:
            return False
        return True

    @rule(image=images, is_waited_for=st.booleans())
    def warm(self, image: int, is_waited_for: bool) -> None:
        one = self.images[image]
        begun = time.time()
        self.control.start_warm(one.id)
        one.use(begun)
        if is_waited_for:
            eventually(lambda: report(self.mount, one.id)["state"] == "verified")
            assert report(self.mount, one.id)["cached_bytes"] == len(one.content)

    # --- restarts -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.kills < 1 and self.handles)
    @rule()
    def kill_the_server(self) -> None:
        """Handles go on. What was changed less than a second before may be lost; so it is done again."""
        self.kills += 1
        before = status(self.mount)["server_pid"]
        os.kill(before, signal.SIGKILL)
        for fd, image in self.handles.values():
            assert os.pread(fd, len(image.content), 0) == image.content  # makes the handle known again
        assert status(self.mount)["server_pid"] != before
        for image in self.images:
            if image.dropped_at_close:
                image.dropped_at_close = False  # the next server knows of no unlink
            os.chown(image.path, image.uid, image.gid)
            image.path.chmod(image.mode)
            os.utime(image.path, ns=(1, 2))
            image.used, image.atime_ns, image.mtime_ns = image.used or (0, time.time()), 1, 2

    @precondition(lambda self: self.restarts < 1)
    @rule()
    def restart(self) -> None:
        self.restarts += 1
        for slot in list(self.handles):
            self.close(slot)
        self.mount.unmount()
        self.mount.start()

    def teardown(self) -> None:
        for fd, _ in self.handles.values():
            os.close(fd)
        for image in self.images:
            image.path.unlink()


@pytest.fixture
def model(tmp_path: Path) -> Iterator[type[ImagesModel]]:
    rng = Random(10)
    with MisbehavingFront() as front:
        # More than the examples take: a failing one is run again and again to make it small.
        contents = [rng.randbytes(size) for size in SIZES]
        pool = iter([front.glance.add(contents[n % len(SIZES)], name=str(n)) for n in range(600)])
        with front_mount(front, tmp_path / "basefs", {"catalog_refresh_s": 3600, "graduate": False}, MAY_LOG) as mount:

            class Bound(ImagesModel):
                pass

            Bound.front, Bound.mount, Bound.pool = front, mount, pool
            yield Bound
            eventually(lambda: status(mount)["open_handles"] == 0)
            assert list((mount.cache_dir / "chunks").iterdir()) == [] or status(mount)["cache_bytes"] == 0


def test_images_do_what_the_model_does(model: type[ImagesModel]) -> None:
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )

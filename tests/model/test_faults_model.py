"""Random faults under random use of a real mount: every byte and every name right, no error but EIO in an outage.

`BASEFS_LONG_S=n` makes it the long form of the soak: n seconds or a little more, with other examples each time.
"""

import contextlib
import errno
import mmap
import os
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from basefs.control.client import ControlClient
from basefs.errors import ControlError
from basefs.keeper_setup import lock_holder
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import eventually, front_mount, status
from tools.mount import BasefsMount
from tools.soak.killer import KILLED_SERVERS_LOG

pytestmark = pytest.mark.mount

LONG_S = float(os.environ.get("BASEFS_LONG_S", "0"))
EXAMPLES = 2
IMAGES_OF_THE_SHORT_FORM = 600
STEPS = 40
FAULTS_MAX = 2
"""Servers that an example may take away: each costs a second."""
SIZES = (3_000_001, 2_097_152, 70_000)
HANDLES_MAX = 5
LOWER_NAMES = ("swap_64", "ephemeral_1_40d1d2c", "notes.part")
OPTIONS = {
    "catalog_refresh_s": 3600,
    "other_io_deadline_s": 1.5,
    "lookup_deadline_s": 1.5,
    "watchdog_s": 3,
    "fetch_request_bytes_max": 256 << 10,
    "cache_max_bytes": 2 << 20,  # far less than the images of one example, so that chunks are evicted all the time
}
MAY_LOG = (
    *KILLED_SERVERS_LOG,
    r"server \d+ hangs",
    r"upgrade: the new server failed \((hung|signal SIGKILL)",  # killed within ten seconds after an upgrade
    r"server \d+ died \(hung",
    r"Glance is away",
    r"the cache is full and nothing more may go",
    r"image \S+: ",
    r"answered EIO",
    r"catalog cannot be refreshed",
)

images = st.integers(0, len(SIZES) - 1)
slots = st.integers(0, HANDLES_MAX - 1)
lower_names = st.sampled_from(LOWER_NAMES)
offsets = st.one_of(
    st.integers(0, max(SIZES) + 10_000), st.sampled_from((0, 4096, 65_535, 65_536, 1 << 20, (1 << 20) - 1, 2_097_151))
)
lengths = st.one_of(st.integers(0, 200_000), st.sampled_from((1, 4096, 65_536, 1 << 20, 4_000_000)))
open_flags = st.sampled_from((os.O_RDONLY, os.O_RDONLY | os.O_DIRECT))
spots_at_once = st.lists(st.tuples(offsets, lengths), min_size=2, max_size=6)
payloads = st.tuples(st.integers(0, 300_000), st.integers(0, 2**32)).map(
    lambda pair: Random(pair[1]).randbytes(pair[0])
)
outages = st.sampled_from(("refused", "hanging", "cut", "lying"))


@dataclass(eq=False)
class Image:
    id: str
    path: Path
    content: bytes = field(repr=False)


@dataclass(eq=False)
class LowerFile:
    """One inode of the lower directory: it has what was written, whatever its name is by now."""

    content: bytearray = field(repr=False, default_factory=bytearray)


def difference(of: Image | LowerFile, offset: int, got: bytes, wanted: bytes) -> str:
    """Where and in what two answers differ."""
    at = next((n for n, (one, other) in enumerate(zip(got, wanted, strict=False)) if one != other), None)
    place = "none differs" if at is None else f"the first that differs is at {offset + at}: {got[at : at + 16].hex()}"
    return f"{type(of).__name__}: {len(got)} bytes for {len(wanted)} at {offset}; {place}"


def copied_by_the_kernel(view: memoryview) -> bytes:
    """The mapped bytes. OSError (EFAULT) where an access of our own would be SIGBUS.

    And that keeps the GIL, which the front needs to answer the server that is to bring the page.
    """
    fd = os.memfd_create("mapped")
    try:
        with view:
            written = 0
            while written < len(view):
                written += os.write(fd, view[written:])
        return os.pread(fd, written, 0)
    finally:
        os.close(fd)


class FaultsModel(RuleBasedStateMachine):
    front: MisbehavingFront
    mount: BasefsMount
    pool: Iterator[str]

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Image] = []
        self.handles: dict[int, tuple[int, Image | LowerFile]] = {}
        self.names: dict[str, LowerFile] = {}
        """What the lower directory has."""
        self.faults = 0
        self.release: threading.Event | None = None
        self.control = ControlClient(self.mount.directory / "control.sock")

    @initialize()
    def take_cold_images(self) -> None:
        for _ in SIZES:
            image_id = next(self.pool)
            path = self.mount.path(image_id)
            self.images.append(Image(id=image_id, path=path, content=self.front.glance.data[image_id]))
            path.stat()
        # What was found out less than a second before a kill may be lost; where Glance is away then, it stays unknown.
        eventually(self.are_verdicts_saved)

    def are_verdicts_saved(self) -> bool:
        # The server has its database for itself; a copy that was taken while it wrote is looked at another time.
        with tempfile.TemporaryDirectory() as directory:
            for name in ("state.sqlite", "state.sqlite-wal"):
                shutil.copy(self.mount.cache_dir / name, directory)
            try:
                with contextlib.closing(sqlite3.connect(f"{directory}/state.sqlite")) as database:
                    rows = database.execute("SELECT image_id FROM image WHERE verdict = 'servable'").fetchall()
            except sqlite3.DatabaseError:
                return False
        return {image.id for image in self.images} <= {image_id for (image_id,) in rows}

    @property
    def is_out(self) -> bool:
        return self.release is not None

    def shown_at(self, path: Path) -> Image | LowerFile:
        """What the model has under an image's name: a lower file of that name wins."""
        return self.names.get(path.name) or next(image for image in self.images if image.path == path)

    # --- reading ------------------------------------------------------------------------------------------

    @rule(image=images, slot=slots, flags=open_flags)
    def open(self, image: int, slot: int, flags: int) -> None:
        if slot not in self.handles:
            path = self.images[image].path
            shown = self.shown_at(path)
            with self.eio_in_an_outage():
                self.handles[slot] = (os.open(path, flags), shown)

    @rule(slot=slots)
    def close(self, slot: int) -> None:
        if slot in self.handles:
            os.close(self.handles.pop(slot)[0])

    @rule(slot=slots, offset=offsets, length=lengths)
    def read(self, slot: int, offset: int, length: int) -> None:
        if slot in self.handles:
            fd, of = self.handles[slot]
            self.check(fd, of, offset, length)

    @rule(spots=spots_at_once)
    def read_at_once(self, spots: list[tuple[int, int]]) -> None:
        with self.reading(spots):
            pass

    @precondition(lambda self: not self.is_out)
    @rule(slot=slots, offset=offsets, length=lengths, is_private=st.booleans())
    def read_mapped(self, slot: int, offset: int, length: int, is_private: bool) -> None:
        """Not in an outage: a page that does not come is SIGBUS, on any file system."""
        if slot not in self.handles or not self.handles[slot][1].content:
            return
        fd, of = self.handles[slot]
        flags = mmap.MAP_PRIVATE if is_private else mmap.MAP_SHARED
        wanted = bytes(of.content[offset : offset + length])
        with mmap.mmap(fd, len(of.content), flags=flags, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            got = copied_by_the_kernel(view[offset : offset + length])
        assert got == wanted, difference(of, offset, got, wanted)

    @rule()
    def forget_cached_pages(self) -> None:
        """What is read next asks the server again."""
        for fd, _ in self.handles.values():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def check(self, fd: int, of: Image | LowerFile, offset: int, length: int) -> None:
        with self.eio_in_an_outage():
            got, wanted = os.pread(fd, length, offset), bytes(of.content[offset : offset + length])
            if self.is_out and len(got) < len(wanted):
                wanted = wanted[: len(got)]  # pread(2): what came before an error, when anything did
            assert got == wanted, difference(of, offset, got, wanted)

    @contextmanager
    def eio_in_an_outage(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO or not self.is_out:
                raise

    @contextmanager
    def reading(self, spots: list[tuple[int, int]]) -> Iterator[None]:
        """All handles are read at all spots at once while the block runs; everything was right when it has ended."""
        with ThreadPoolExecutor(8) as pool:
            reads = [pool.submit(self.check, fd, of, *spot) for spot in spots for fd, of in self.handles.values()]
            yield
        for read in reads:
            read.result()

    # --- names and lower files ----------------------------------------------------------------------------

    @rule(name=lower_names, content=payloads)
    def write_lower(self, name: str, content: bytes) -> None:
        """As nova does: a file of its own, anew if it is there."""
        (self.mount.mountpoint / name).write_bytes(content)
        self.names.setdefault(name, LowerFile()).content[:] = content

    @rule(name=lower_names, slot=slots, flags=st.sampled_from((os.O_RDWR, os.O_RDWR | os.O_APPEND)))
    def open_lower(self, name: str, slot: int, flags: int) -> None:
        if slot not in self.handles and name in self.names:
            self.handles[slot] = (os.open(self.mount.mountpoint / name, flags), self.names[name])

    @rule(slot=slots, offset=st.integers(0, 400_000), content=payloads)
    def write_by_handle(self, slot: int, offset: int, content: bytes) -> None:
        fd, of = self.handles.get(slot, (-1, None))
        if isinstance(of, LowerFile) and self.is_writable(fd) and content:
            if self.appends(fd):
                offset = len(of.content)  # pwrite(2): O_APPEND wins
            assert os.pwrite(fd, content, offset) == len(content)
            of.content.extend(bytes(max(0, offset - len(of.content))))
            of.content[offset : offset + len(content)] = content

    @rule(name=lower_names, image=images)
    def rename_onto_an_image(self, name: str, image: int) -> None:
        """As nova does with what it has downloaded itself."""
        if name in self.names:
            path = self.images[image].path
            (self.mount.mountpoint / name).rename(path)
            self.names[path.name] = self.names.pop(name)

    @rule(name=lower_names)
    def unlink_lower(self, name: str) -> None:
        if self.names.pop(name, None) is not None:
            (self.mount.mountpoint / name).unlink()

    @rule(image=images)
    def unlink_what_has_the_name_of_an_image(self, image: int) -> None:
        """A lower file goes; of an image its bytes here, now or at its last close."""
        path = self.images[image].path
        path.unlink()
        self.names.pop(path.name, None)

    @rule()
    def list_names(self) -> None:
        ours = {image.path.name for image in self.images}
        listed = set(os.listdir(self.mount.mountpoint))
        assert set(self.names) <= listed
        assert ours <= listed
        assert not (set(LOWER_NAMES) - set(self.names)) & listed

    @rule()
    def look_at_sizes(self) -> None:
        for image in self.images:
            with self.eio_in_an_outage():
                assert image.path.stat().st_size == len(self.shown_at(image.path).content)
        for name, file in self.names.items():
            assert (self.mount.mountpoint / name).stat().st_size == len(file.content)

    def is_writable(self, fd: int) -> bool:
        return self.flags(fd) & os.O_ACCMODE == os.O_RDWR

    def appends(self, fd: int) -> bool:
        return bool(self.flags(fd) & os.O_APPEND)

    def flags(self, fd: int) -> int:
        line = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()[1]
        return int(line.split()[1], 8)

    # --- what is here -------------------------------------------------------------------------------------

    @rule(image=images)
    def evict(self, image: int) -> None:
        try:
            self.control.evict(self.images[image].id)
        except ControlError as error:
            if "open" not in str(error):
                raise

    @rule(image=images)
    def warm(self, image: int) -> None:
        self.control.start_warm(self.images[image].id)

    # --- faults -------------------------------------------------------------------------------------------

    def may_fault(self) -> bool:
        return self.faults < FAULTS_MAX

    @precondition(may_fault)
    @rule(spots=spots_at_once, delay_s=st.sampled_from((0.0, 0.005, 0.05)))
    def kill_the_server(self, spots: list[tuple[int, int]], delay_s: float) -> None:
        self.fault(spots, delay_s, lambda: self.signal_server(signal.SIGKILL))

    @precondition(may_fault)
    @rule(spots=spots_at_once, delay_s=st.floats(0.0, 0.9))
    def kill_the_server_and_the_next_while_it_starts(self, spots: list[tuple[int, int]], delay_s: float) -> None:
        def twice() -> None:
            first = self.signal_server(signal.SIGKILL)
            eventually(lambda: self.server_pid() != first)
            threading.Event().wait(delay_s)
            self.signal_server(signal.SIGKILL)

        self.fault(spots, 0.0, twice)

    @precondition(may_fault)
    @rule(spots=spots_at_once)
    def the_server_hangs(self, spots: list[tuple[int, int]]) -> None:
        self.fault(spots, 0.0, lambda: self.signal_server(signal.SIGSTOP))

    @precondition(may_fault)
    @rule(spots=spots_at_once)
    def upgrade(self, spots: list[tuple[int, int]]) -> None:
        self.fault(spots, 0.0, lambda: self.mount.cli("upgrade", check=False))

    def fault(self, spots: list[tuple[int, int]], delay_s: float, happens: Callable[[], object]) -> None:
        """Let it happen while all handles are read; they and all names are right afterwards."""
        self.faults += 1
        with self.reading(spots):
            threading.Event().wait(delay_s)
            happens()
        for fd, of in self.handles.values():
            self.check(fd, of, 0, 4096)
        self.list_names()

    def server_pid(self) -> int:
        holder = lock_holder(self.mount.cache_dir)
        assert holder is not None
        return int(holder["server_pid"])

    def signal_server(self, number: signal.Signals) -> int:
        pid = self.server_pid()
        os.kill(pid, number)
        return pid

    @precondition(lambda self: not self.is_out)
    @rule(kind=outages)
    def glance_goes_away(self, kind: str) -> None:
        self.release = threading.Event()
        how = {
            "refused": answers.status(503),
            "hanging": answers.hang(self.release),
            "cut": answers.cut_and_reset(after=10_000),
            "lying": answers.too_short(by=1000),
        }
        self.front.on("").respond(how[kind])

    @precondition(lambda self: self.is_out)
    @rule()
    def glance_is_back(self) -> None:
        """Whoever asks once more has his bytes, after the longest back-off at the latest."""
        self.front.behave()
        assert self.release is not None
        self.release.set()
        for fd, of in self.handles.values():
            eventually(lambda fd=fd, of=of: self.has_all(fd, of), 30)
        for image in self.images:
            eventually(lambda image=image: self.has_size(image), 30)
        self.release = None

    def has_all(self, fd: int, of: Image | LowerFile) -> bool:
        try:
            assert os.pread(fd, len(of.content) + 1, 0) == bytes(of.content)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        return True

    def has_size(self, image: Image) -> bool:
        try:
            return image.path.stat().st_size == len(self.shown_at(image.path).content)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False

    def teardown(self) -> None:
        if self.release is not None:
            self.glance_is_back()
        for fd, of in self.handles.values():
            assert os.pread(fd, len(of.content) + 1, 0) == bytes(of.content)
            os.close(fd)
        for name in self.names:
            (self.mount.mountpoint / name).unlink()
        for image in self.images:
            assert image.path.read_bytes() == image.content
            image.path.unlink()


@pytest.fixture
def model(tmp_path: Path) -> Iterator[type[FaultsModel]]:
    rng = Random(11)
    with MisbehavingFront() as front:
        # More than the examples take: a failing one is run again and again to make it small.
        contents = [rng.randbytes(size) for size in SIZES]
        count = round(IMAGES_OF_THE_SHORT_FORM + LONG_S * 2)
        pool = iter([front.glance.add(contents[n % len(SIZES)], name=str(n)) for n in range(count)])
        with front_mount(front, tmp_path / "basefs", OPTIONS, MAY_LOG) as mount:

            class Bound(FaultsModel):
                pass

            Bound.front, Bound.mount, Bound.pool = front, mount, pool
            yield Bound
            eventually(lambda: status(mount)["open_handles"] == 0)
            assert status(mount)["damaged_chunks"] == 0


def test_no_fault_costs_a_byte_or_a_name(model: type[FaultsModel]) -> None:
    until = time.monotonic() + LONG_S
    while True:
        run_state_machine_as_test(
            model,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                derandomize=not LONG_S,
                print_blob=True,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            ),
        )
        if time.monotonic() >= until:
            return

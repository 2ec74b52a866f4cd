"""What a peer is: something that makes a far disk readable here, its processes, and its end."""

import abc
import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from tools.bench.peers.site import Access, Disk
from tools.guest import create_overlay
from tools.mount import RUN_VARIABLE, pids_with_environment

START_S = 30.0
END_S = 10.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class PeerError(Exception):
    """A peer did not do what it was started for; the message has the end of what it said."""


class TooLongError(Exception):
    """The work was given up at its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Processor time of processes since their start, and the most memory each had, summed: shared pages count twice."""

    cpu_s: float
    memory_bytes: int


class Peer(abc.ABC):
    """One way to read far disks, over `access`, with all it owns under `directory`.

    Use it as a context manager: whatever it started or mounted is gone afterwards, also after a failure.
    """

    name: ClassVar[str]
    shares: ClassVar[bool] = True
    """Whether several guests of one disk share what was fetched."""
    takes_parallel_misses: ClassVar[bool] = True
    """Whether a path may be read by several at once, or through the page cache, before all of it is here."""

    def __init__(self, access: Access, directory: Path) -> None:
        self.access = access
        self.directory = directory
        self.run_id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._spawned: list[subprocess.Popen[bytes]] = []
        self._brought: dict[tuple[str, int], tuple[threading.Lock, list[Path]]] = {}

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @classmethod
    @abc.abstractmethod
    def version(cls) -> str:
        """What it is and which version, on one line."""

    def start(self) -> None:  # noqa: B027 (most have nothing of the kind)
        """Bring up what serves all disks of a node; that is there before a guest comes and is not measured."""

    @abc.abstractmethod
    def bring(self, disk: Disk, guest: int, limit_s: float) -> Path:
        """Make the disk's bytes readable at a path; TooLongError after `limit_s`."""

    def path(self, disk: Disk, guest: int = 0, *, limit_s: float = START_S) -> Path:
        """Where the disk's bytes can be read for this guest; the first call brings it there. Safe from any thread."""
        key = (disk.name, 0 if self.shares else guest)
        with self._lock:
            lock, paths = self._brought.setdefault(key, (threading.Lock(), []))
        with lock:
            if not paths:
                paths.append(self.bring(disk, guest, limit_s))
            return paths[0]

    def overlay(self, disk: Disk, target: Path, *, limit_s: float) -> str:
        """Make a qcow2 overlay for a guest; returns further options for its -drive."""
        create_overlay(self.path(disk, limit_s=limit_s), target)
        return ""

    def pids(self) -> list[int]:
        """Its processes, as they are now."""
        # For a moment of its exec a process has no environment to be found by.
        spawned = {process.pid for process in self._spawned if process.poll() is None}
        return sorted(spawned.union(pids_with_environment(self.run_id)))

    def usage(self) -> Usage:
        """What its running processes have used, and children of theirs that have ended."""
        return usage_of(self.pids())

    def run(self, *argv: str | os.PathLike[str]) -> None:
        """Run a command that ends, or that goes on as a daemon once it serves; PeerError when it fails."""
        self._note(argv)
        with open(self.directory / "log", "ab") as log:
            done = subprocess.run(
                argv, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=START_S
            )
        if done.returncode:
            raise PeerError(f"{argv[0]!s} exited with {done.returncode}:\n{self.said()}")

    def spawn(self, *argv: str | os.PathLike[str]) -> "subprocess.Popen[bytes]":
        """Start a command that goes on; it is reaped when it ends in `stop`."""
        self._note(argv)
        with open(self.directory / "log", "ab") as log:
            process = subprocess.Popen(argv, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._spawned.append(process)
        return process

    def show_by_nbdfuse(self, socket: Path, mountpoint: Path) -> Path:
        """Make what an NBD server has at a Unix socket a file; returns it."""
        mountpoint.mkdir()
        wait_for_mount(mountpoint, self.spawn("nbdfuse", "-r", mountpoint / "disk", "--unix", socket))
        return mountpoint / "disk"

    def said(self) -> str:
        """The end of what its commands said."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "log").read_text(encoding="utf-8", errors="replace")[-2000:]
        return ""

    def stop(self) -> None:
        """Unmount, end every process, remove the directory."""
        for mountpoint in reversed(mounts_below(self.directory)):
            # Lazily: a server that hangs would hang the unmounting too, and it is ended only then.
            subprocess.run(["umount", "-l", mountpoint], capture_output=True)
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            deadline = time.monotonic() + END_S
            while self.pids() and time.monotonic() < deadline:
                time.sleep(0.02)
        for process in self._spawned:
            process.wait(END_S)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, RUN_VARIABLE: self.run_id, "TMPDIR": str(self.directory)}

    def _note(self, argv: tuple[str | os.PathLike[str], ...]) -> None:
        with open(self.directory / "log", "a", encoding="utf-8") as log:
            log.write("$ " + " ".join(map(str, argv)) + "\n")


def wait_for_mount(path: Path, process: "subprocess.Popen[bytes]") -> None:
    """Return when something is mounted at `path`; PeerError when `process` ended before, or after START_S."""
    deadline = time.monotonic() + START_S
    while str(path) not in mounts_below(path):
        if process.poll() is not None or time.monotonic() > deadline:
            raise PeerError(f"nothing was mounted at {path}")
        time.sleep(0.005)


def mounts_below(directory: Path) -> list[str]:
    """Mount points at or below a directory, in the order in which they were mounted."""
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        points = [line.split()[4] for line in mounts]
    return [point for point in points if point == str(directory) or point.startswith(f"{directory}/")]


def usage_of(pids: list[int]) -> Usage:
    """What these processes have used so far; one that has just ended counts for nothing."""
    cpu_s, memory_bytes = 0.0, 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            with (
                open(f"/proc/{pid}/stat", encoding="utf-8") as stat,
                open(f"/proc/{pid}/status", encoding="utf-8") as status,
            ):
                ticks = stat.read().rpartition(") ")[2].split()[11:15]
                peak = next((line.split()[1] for line in status if line.startswith("VmHWM:")), "0")
            cpu_s += sum(map(int, ticks)) * _TICK_S
            memory_bytes += int(peak) * 1024
    return Usage(cpu_s=cpu_s, memory_bytes=memory_bytes)

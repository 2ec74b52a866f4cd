"""Which images are backing files of overlays under nova's `instances_path`, found as nova's image cache finds them.

Instance directories (also `<uuid>_resize` and `<uuid>_del`) with `disk` and `disk.*` in them; the qcow2 header of
each names its backing file. All of it may be on NFS and may have been written by anybody: it is read in a thread of
its own, with limits; no link is followed; what is no regular file is not opened. Nothing on a FUSE mount is ever
touched, for one of them is ours: the server would wait for itself.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trio

from basefs import mounts
from basefs.concurrency.threads import BlockingCalls
from basefs.core.qcow2_header import HEADER_BYTES, backing_name, base_names_in
from basefs.observability import ConditionLog

log = logging.getLogger(__name__)

SCAN_EVERY_S = 60.0
FRESH_S = 5.0
"""Eviction looks again when the last scan is older."""
SCAN_WAIT_S = 2.0
"""Eviction does not wait longer for it: then what was seen last counts."""
ENTRIES_MAX = 100_000
FILES_MAX = 64
"""Disks of one instance that are looked at."""
USERS_MAX = 8
"""Overlays that are remembered by name of one base."""
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(slots=True)
class OverlayScan:
    """What one look found. `users`: overlays by the name of their base, at most USERS_MAX each."""

    users: dict[str, list[str]] = field(default_factory=dict)
    problem: str | None = None
    """Why it may not be all; None when it is."""

    def add(self, base_name: str, overlay: str) -> None:
        """`overlay` (relative to instances_path) has this base."""
        users = self.users.setdefault(base_name, [])
        if len(users) < USERS_MAX:
            users.append(overlay)


def scan_overlays(instances_path: Path, skipped: frozenset[str]) -> OverlayScan:
    """Look at every instance (thread). Never fails: what could not be looked at is its `problem`.

    `skipped`: absolute paths that are not touched.
    """
    found = OverlayScan()
    try:
        directory = os.open(instances_path, _OPEN | os.O_DIRECTORY)
    except OSError as exc:
        found.problem = f"{instances_path}: {exc.strerror}"
        return found
    try:
        _scan_instances(directory, str(instances_path), skipped, found)
    except OSError as exc:
        found.problem = f"{instances_path}: {exc.strerror}"
    finally:
        os.close(directory)
    return found


def _scan_instances(directory: int, path: str, skipped: frozenset[str], found: OverlayScan) -> None:
    with os.scandir(directory) as entries:
        for count, entry in enumerate(entries):
            if count >= ENTRIES_MAX:
                found.problem = f"{path}: more than {ENTRIES_MAX} entries"
                return
            if f"{path}/{entry.name}" in skipped or not entry.is_dir(follow_symlinks=False):
                continue
            try:
                instance = os.open(entry.name, _OPEN | os.O_DIRECTORY, dir_fd=directory)
            except OSError as exc:
                _note(found, f"{path}/{entry.name}", exc)
                continue
            try:
                for name in _disk_names(instance):
                    if f"{path}/{entry.name}/{name}" not in skipped:
                        _read_overlay(instance, name, f"{entry.name}/{name}", found)
            except OSError as exc:
                _note(found, f"{path}/{entry.name}", exc)
            finally:
                os.close(instance)


def _disk_names(instance: int) -> Iterator[str]:
    count = 0
    with os.scandir(instance) as entries:
        for entry in entries:
            is_disk = entry.name == "disk" or entry.name.startswith("disk.")
            if is_disk and count < FILES_MAX and entry.is_file(follow_symlinks=False):
                count += 1
                yield entry.name


def _read_overlay(instance: int, name: str, shown: str, found: OverlayScan) -> None:
    try:
        fd = os.open(name, _OPEN, dir_fd=instance)
    except OSError as exc:
        _note(found, shown, exc)
        return
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return
        where = backing_name(os.pread(fd, HEADER_BYTES, 0))
        if where is not None:
            for base_name in base_names_in(os.pread(fd, where.length, where.offset)):
                found.add(base_name, shown)
    except ValueError as exc:
        log.debug("%s is no overlay: %s", shown, exc)
    except OSError as exc:
        _note(found, shown, exc)
    finally:
        os.close(fd)


def _note(found: OverlayScan, path: str, exc: OSError) -> None:
    if exc.errno not in _GONE:  # what went while we looked is no overlay any more
        found.problem = f"{path}: {exc.strerror}"


class OverlayWatch:
    """Knows which images have overlays. Owned by the trio loop.

    A look that could not see all adds to what was known; before the first complete one nothing is known, and every
    image that was used here counts as in use.
    """

    def __init__(self, instances_path: Path, mountpoint: Path) -> None:
        self._instances_path = instances_path
        self._mountpoint = mountpoint
        self._threads = BlockingCalls("overlays", threads_max=1)
        self._users: dict[str, list[str]] = {}
        self._is_known = False
        self._looked_at: float | None = None
        self._looks_begun = 0
        self._complete_look = 0
        self._looked = trio.Event()
        self._wanted = trio.Event()
        self._told = ConditionLog(log, clock=trio.current_time)
        self.looked: Callable[[], None] = lambda: None
        """Called after each look; the hydrator's, once there is one."""

    @property
    def is_known(self) -> bool:
        """Whether a look was complete."""
        return self._is_known

    def users(self, base_name: str) -> list[str]:
        """Overlays of the image, relative to instances_path; a few of them."""
        return self._users.get(base_name, [])

    async def run(self) -> None:
        """Look every minute, and when somebody asks. Ends when it is cancelled."""
        while True:
            self._wanted = trio.Event()
            await self._look()
            with trio.move_on_after(SCAN_EVERY_S):
                await self._wanted.wait()

    def look_soon(self) -> None:
        """Look now, or once more after the look under way; `looked` tells."""
        self._wanted.set()

    async def refresh(self) -> None:
        """Return when a look is not older than FRESH_S, or after SCAN_WAIT_S."""
        if self._looked_at is not None and trio.current_time() - self._looked_at < FRESH_S:
            return
        self._wanted.set()
        with trio.move_on_after(SCAN_WAIT_S):
            await self._looked.wait()

    async def see_all(self) -> bool:
        """Look now, and say whether all overlays that there were at the call are known."""
        begun = self._looks_begun
        for _ in range(2):  # a look that is under way was begun too soon
            self._wanted.set()
            await self._looked.wait()
            if self._complete_look > begun:
                return True
        return False

    async def _look(self) -> None:
        begun_at = trio.current_time()
        self._looks_begun += 1
        found = await self._threads.run(_scan, self._instances_path, self._mountpoint)
        if found.problem is None:
            self._users = found.users
            self._is_known = True
            self._looked_at = begun_at
            self._complete_look = self._looks_begun
        else:
            self._users = {**self._users, **found.users}
            self._told.begins(
                "scan", logging.WARNING, "not all overlays can be seen, those known stay: %s", found.problem
            )
        self._looked.set()
        self._looked = trio.Event()
        self.looked()


def _scan(instances_path: Path, mountpoint: Path) -> OverlayScan:
    """In a thread."""
    skipped = {mount.mountpoint for mount in mounts.mount_table() if mount.fstype.startswith("fuse")}
    return scan_overlays(instances_path, frozenset({*skipped, str(mountpoint)}))

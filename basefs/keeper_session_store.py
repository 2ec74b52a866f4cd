"""One session in systemd's fd store: saved when it begins, adopted by the next keeper, removed when it ends.

Standard library only. What has to be true before a session is adopted is in `_adoptable`; whatever else systemd passes
is closed, and removed from the store if a basefs put it there.
"""

import json
import logging
import os
import socket
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from basefs.keeper_fd_store import CHANNEL, PREFIX, FdStore, HeldNotes, remove_stored
from basefs.keeper_held import HeldFds
from basefs.keeper_reader_process import Place
from basefs.keeper_saved_session import SavedSession
from basefs.kernel_session import KernelSession
from basefs.service_manager import close_all, inherited_fds

log = logging.getLogger("basefs.keeper")

MESSAGE_BYTES_MAX = 64 * 1024
FDS_MAX = 4
PARTS = ("session", "notes", "lock", "lower", "fuse")
PLACE = ("p", "s")
"""A reader's clone of /dev/fuse, and its slots: `p<n>`, `s<n>`."""
Group = dict[str, int]
"""Inherited fds of one token, by what they are."""


class Adopted(NamedTuple):
    """A session that goes on under this keeper; the fds are the caller's."""

    session: KernelSession
    saved: SavedSession
    lower_fd: int
    lock_fd: int


class SessionStore:
    """The fds of the keeper's session in the fd store, and what servers gave to hold (`held`), which goes there too.

    Without a service manager everything works, and nothing is stored.
    """

    def __init__(self, token: str | None = None, notes_fd: int | None = None) -> None:
        self._store = FdStore(token)
        self._notes = HeldNotes(self._store, notes_fd)
        self.held = HeldFds(keep=self._notes if "NOTIFY_SOCKET" in os.environ else None)
        self.is_stored = notes_fd is not None
        self._channels: list[int] = []
        self.places: dict[int, Place] = {}
        """Those of the readers of an earlier keeper."""

    def save(self, session: KernelSession, fds: Group, *, cache_dir: str, fixed: dict[str, Any]) -> None:
        """Store what the next keeper needs, `fds` being `lower` and `lock`. What was adopted is stored already."""
        if self.is_stored:
            return
        saved = SavedSession(
            mountpoint=session.mountpoint,
            cache_dir=cache_dir,
            entry=session.entry,
            init_request=session.init_request,
            fixed=fixed,
        )
        session_fd = saved.to_memfd()
        try:
            fds = {**fds, "fuse": session.fd, "notes": self._notes.fd, "session": session_fd}
            self.is_stored = all(self._store.put(what, fd) for what, fd in fds.items())
        finally:
            os.close(session_fd)
        if not self.is_stored and "NOTIFY_SOCKET" in os.environ:
            log.warning("the service manager does not keep our fds: the mount would not outlive this process")

    def keep_place(self, number: int, place: Place) -> bool:
        """Store a reader's place; False where the session would outlive us and the place would not."""
        self.places[number] = place
        stored = [self._store.put(f"{what}{number}", fd) for what, fd in zip(PLACE, place, strict=True)]
        return all(stored) or not self.is_stored

    def restore_places(self, fds: Group) -> None:
        """Take over the places of an earlier keeper's readers; one that is not whole has no reader to follow."""
        for number in {int(what[1:]) for what in fds}:
            pair = [fds.get(f"{what}{number}") for what in PLACE]
            if None not in pair:
                self.places[number] = Place(*(fd for fd in pair if fd is not None))

    def clear(self) -> None:
        """The session is over: nothing of it stays."""
        self.held.close()
        self._notes.forget_channel()
        for what in PARTS:
            self._store.remove(what)
        for number in self.places:
            for what in PLACE:
                self._store.remove(f"{what}{number}")
        self.is_stored = False

    def restore_channels(self, fds: Group) -> None:
        """Have what servers said to an earlier keeper read by `read_channels`; `fds` are ours."""
        numbers = sorted(int(what.removeprefix(CHANNEL)) for what in fds)
        self._notes.restore_channels(numbers)
        self._channels = [fds[f"{CHANNEL}{number}"] for number in numbers]
        for number in numbers[:-1]:
            self._store.remove(f"{CHANNEL}{number}")

    def read_channels(self) -> None:
        """Hold and drop what a server asked for when it had no keeper any more. The server has ended."""
        for fd in self._channels:
            with socket.socket(fileno=fd) as channel:
                for message, fds in _messages(channel):
                    if message.get("type") == "drop":
                        self.held.drop(str(message.get("key")))
                    elif message.get("type") == "hold" and fds:
                        self.held.take(str(message.get("key")), message.get("note"), fds.pop(0))
                    close_all(fds)
        self._channels = []

    def restore_held(self, fds: Group) -> None:
        """Hold again what an earlier keeper held, `fds` by their numbers; what does not fit together is dropped."""
        for note in self._notes.restore():
            fd = fds.pop(str(note.number), None)
            if fd is None:
                self._notes.forget(note.number)
                continue
            try:
                self.held.restore(note.text, fd, note.number)
            except ValueError:
                self._notes.forget(note.number)
                os.close(fd)
        for what, fd in fds.items():
            self._store.remove(what)
            os.close(fd)


def adopt_session() -> tuple[SessionStore, Adopted | None]:
    """The session that systemd has kept for us, if it goes on, and the store of ours.

    Everything that systemd passed belongs to the result or is closed.
    """
    for token, group in _groups(inherited_fds()).items():
        adopted = _adopted_or_told(group)
        if adopted is None:
            close_all(list(group.values()))
            for what in group:
                remove_stored(FdStore(token).name(what))
            continue
        store = SessionStore(token, group["notes"])
        os.close(group["session"])
        store.restore_held({what: fd for what, fd in group.items() if what.isdecimal()})
        store.restore_channels({what: fd for what, fd in group.items() if _is_channel(what)})
        store.restore_places({what: fd for what, fd in group.items() if _is_place(what)})
        return store, adopted
    return SessionStore(), None


def _is_channel(what: str) -> bool:
    return what.startswith(CHANNEL) and what.removeprefix(CHANNEL).isdecimal()


def _is_place(what: str) -> bool:
    return what.startswith(PLACE) and what[1:].isdecimal()


def _messages(channel: socket.socket) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """What waits in the socket, with its fds, which are the caller's."""
    channel.setblocking(False)
    was_reset = False
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(channel, MESSAGE_BYTES_MAX, FDS_MAX)
        except ConnectionResetError:
            # Told once, before what a dead server had sent: it had not read something of its keeper's.
            if was_reset:
                return
            was_reset = True
            continue
        except OSError:
            return
        if not data and not fds:
            return
        try:
            message = json.loads(data)
        except ValueError:
            message = None
        yield (message if isinstance(message, dict) else {}), fds


def _groups(fds: list[tuple[str, int]]) -> dict[str, Group]:
    """Ours by token; others are closed."""
    groups: dict[str, Group] = {}
    for name, fd in fds:
        token, _, what = name.removeprefix(PREFIX).partition(".")
        if not name.startswith(PREFIX) or not what or what in groups.setdefault(token, {}):
            log.info("an fd that systemd passed is none of ours: %s", name)
            os.close(fd)
        else:
            groups[token][what] = fd
    return groups


def _adopted_or_told(group: Group) -> Adopted | None:
    try:
        return _adopted(group)
    except ValueError as exc:
        log.warning("the session that systemd kept cannot be adopted: %s", exc)
        return None


def _adopted(group: Group) -> Adopted:
    """The session of these fds.

    Raises:
        ValueError: Why it cannot go on under this keeper.
    """
    missing = [what for what in PARTS if what not in group]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    saved = SavedSession.from_memfd(group["session"])
    session = KernelSession.of_another_keeper(saved.mountpoint, group["fuse"], saved.entry, saved.init_request)
    if session.has_ended():
        raise ValueError(f"{saved.mountpoint} was unmounted, or its FUSE connection aborted")
    # It is alive, so its device number is still its own: a mount with this number is a mount of this session.
    lower = os.fstat(group["lower"])
    if not stat.S_ISDIR(lower.st_mode) or lower.st_dev == os.makedev(saved.entry.major, saved.entry.minor):
        raise ValueError("the lower directory is none")
    return Adopted(session=session, saved=saved, lower_fd=group["lower"], lock_fd=group["lock"])

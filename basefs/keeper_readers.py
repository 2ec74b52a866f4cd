"""The reader processes of one mount: how many there are, who follows whom, who serves with which server. Stdlib only.

Invariants:
- A place (clone of /dev/fuse and slots) stays open until the session is over: closing a clone fails what was taken
  through it. At most one reader has it; the next is started when that one has ended.
- A reader's death has nothing resent: the server answers on the clone what was handed on, and the next reader finds in
  the slots what was not.
- What they share has one layout in a session, the keeper's: a reader of another one gets no place, and a server of
  another one no readers.
- A reader gets a server only after the kernel has resent what dead servers had taken. Before that its connection to the
  last server is cut, so nothing that it takes after the resending goes to nobody.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from signal import SIGKILL
from typing import Any

from basefs.hardening import set_oom_score
from basefs.keeper_reader_process import Place, ReaderProcess, clear_slots, new_place, taken_slots
from basefs.keeper_reader_seat import Seat
from basefs.kernel_session import KernelSession
from basefs.reader_layout import LAYOUT
from basefs.server_process import END_LIMIT_S, ServerProcess, describe_exit

log = logging.getLogger("basefs.keeper")

READERS_MAX = 16
STEADY_S = 10.0
"""A reader that lived so long is replaced at once; others after a pause that doubles."""
QUICK_S = 0.2
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 30.0
QUICK_DEATHS_MAX = 3
"""So many in a row, and what they left in their slots is suspected: the kernel hands it out again, to anybody."""
CURE = "a restart of the unit brings them"
BUFFER_BYTES = 4 << 20
"""Of the socket to the server: a write of 1 MiB at once, and room for others behind it."""


class Readers:
    """At most READERS_MAX; none where the kernel cannot clone or resend. `keep` leaves a place with the next keeper."""

    def __init__(
        self,
        session: KernelSession,
        places: dict[int, Place],
        *,
        lock_fd: int,
        oom_score: int,
        keep: Callable[[int, Place], bool],
    ) -> None:
        self._session = session
        self._seats = [Seat(number, place) for number, place in sorted(places.items())]
        self._lock_fd = lock_fd
        self._oom_score = oom_score
        self._keep = keep
        self._wanted = 0
        self._watchdog_s = 0.0
        self._server: ServerProcess | None = None
        self.reason = ""
        """Why there are none, or fewer than wanted."""
        self._deaths = 0

    def __len__(self) -> int:
        """Places, whether they have a reader or not."""
        return len(self._seats)

    # --- servers ----------------------------------------------------------------------------------------

    @staticmethod
    def are_known_to(server: ServerProcess) -> bool:
        """Whether the server can have readers: it speaks of the layout that the places have."""
        return server.loaded.get("reader_layout") == LAYOUT

    def cut(self) -> None:
        """The server has ended, or another one is about to have the session."""
        self._server = None
        for seat in self._seats:
            seat.cut()

    def connect(self, server: ServerProcess) -> None:
        """The server has the session, and the kernel has resent what it resends."""
        self._server = server
        for seat in self._seats:
            self._connect(seat)

    def _connect(self, seat: Seat) -> None:
        if self._server is None or seat.reader is None or not seat.reader.is_ready:
            return
        theirs, servers = socket.socketpair()
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            fds = (servers.fileno(), *seat.place)
            self._server.send({"type": "reader", "number": seat.number}, fds)
            seat.reader.send({"type": "server"}, theirs.fileno())
        seat.cut()
        seat.server_end = servers

    def give_up(self) -> None:
        """The next server does not know them: end them before the kernel resends, which their slots are part of."""
        for seat in self._seats:
            if seat.reader is not None:
                seat.reader.kill("the server does not know it")
                seat.reader.wait(END_LIMIT_S)
                seat.reader.close()
                seat.reader, seat.end_by_s, seat.next_s = None, None, None
                seat.watchdog.end()
            clear_slots(seat.place)
        if self._seats:
            self._tell_none(f"the server's are of another layout; {CURE}")
            # As it expects: with readers our own servers want a read that never waits.
            os.set_blocking(self._session.fd, True)

    def serves(self, wanted: int, *, watchdog_s: float, now_s: float) -> None:
        """The server that serves now wants so many readers."""
        self._watchdog_s = watchdog_s
        self._wanted = max(0, min(wanted, READERS_MAX))
        while len(self._seats) < self._wanted and self._add_seat():
            pass
        for seat in self._seats:
            if seat.number >= self._wanted:
                seat.next_s = None
                seat.stop(now_s)
            elif seat.reader is None and seat.next_s is None:
                seat.next_s = now_s

    def renew(self, now_s: float) -> None:
        """Replace all of them by readers of what is installed now."""
        for seat in self._seats:
            seat.stop(now_s)

    def _add_seat(self) -> bool:
        number = len(self._seats)
        if not self._session.can_resend:
            self._tell_none("this kernel cannot resend requests (Linux 6.9 can)")
            return False
        try:
            place = new_place(self._session.fd)
        except OSError as exc:
            self._tell_none(f"no clone of /dev/fuse: {exc.strerror}")
            return False
        seat = Seat(number, place)
        self._seats.append(seat)
        if not self._keep(number, place):
            self._tell_none("the service manager does not keep their fds")
            self._wanted = 0
            return False
        return True

    def _tell_none(self, why: str) -> None:
        if not self.reason:
            log.info("no reader processes: %s", why)
        self.reason = why

    # --- their lives ------------------------------------------------------------------------------------

    def fds(self) -> list[int]:
        """What to wait for; pass what became readable to `handle`."""
        found = []
        for seat in self._seats:
            if seat.reader is not None:
                found.append(seat.reader.pidfd)
                if not seat.reader.is_silent:
                    found.append(seat.reader.control.fileno())
        return found

    def due_s(self) -> float | None:
        """When `on_time` has something to do (time.monotonic()), None: never."""
        return min((due_s for seat in self._seats if (due_s := seat.due_s()) is not None), default=None)

    def handle(self, ready: set[int]) -> None:
        """Deal with what the readers said or did.

        Raises:
            SessionEndedError: One ended because the session did.
        """
        for seat in self._seats:
            reader = seat.reader
            if reader is None:
                continue
            if reader.control.fileno() in ready:
                self._hear(seat, reader)
            if reader.pidfd in ready:
                self._ended(seat, reader)

    def _hear(self, seat: Seat, reader: ReaderProcess) -> None:
        message = reader.receive()
        if message is None:
            return
        if message.get("type") == "ready" and message.get("layout") != LAYOUT:
            self._wanted = 0
            self._tell_none(f"those that are installed now are of another layout; {CURE}")
            seat.stop(time.monotonic())
        elif message.get("type") == "ready":
            reader.give_place()
            if seat.end_by_s is None:
                seat.watchdog.begin(time.monotonic(), self._watchdog_s)
            self._connect(seat)
        elif message.get("type") == "pong":
            seat.watchdog.pong(message.get("n"))

    def _ended(self, seat: Seat, reader: ReaderProcess) -> None:
        now_s = time.monotonic()
        was_asked = seat.end_by_s is not None and not reader.failure
        exit_code = reader.close()
        seat.reader, seat.end_by_s = None, None
        seat.watchdog.end()
        seat.cut()
        self._session.check()
        is_wanted = seat.number < self._wanted
        if was_asked:
            seat.quick_deaths, delay_s = 0, 0.0
        else:
            was_killed = exit_code in (-SIGKILL, None) and not reader.failure
            delay_s = self._died(seat, now_s - seat.started_s, was_killed=was_killed)
            why = reader.failure or describe_exit(exit_code)
            log.warning("reader %d died (%s); starting another", seat.number, why)
        seat.next_s = now_s + delay_s if is_wanted else None
        if not is_wanted or seat.quick_deaths >= QUICK_DEATHS_MAX:
            self._hand_back(seat)

    def _died(self, seat: Seat, lived_s: float, *, was_killed: bool) -> float:
        """Seconds to wait before the next one. A SIGKILL from outside says nothing against what is in the slots."""
        self._deaths += 1
        if lived_s >= STEADY_S:
            seat.quick_deaths = 0
        elif not was_killed:
            seat.quick_deaths += 1
        if lived_s >= QUICK_S and seat.quick_deaths <= 1:
            return 0.0
        return min(BACKOFF_FIRST_S * float(1 << max(0, seat.quick_deaths - 1)), BACKOFF_MAX_S)

    def _hand_back(self, seat: Seat) -> None:
        """Let anybody have what this reader's successors would: there is none, or it ends them.

        The kernel hands out what is at work in the server, too. Reading twice does no harm, and what changes the lower
        directory may then fail as after a kill (SEMANTICS, section 12).
        """
        if taken_slots(seat.place):
            log.warning("the requests that reader %d had taken are handed out again", seat.number)
            with contextlib.suppress(OSError):  # The session is ending, which is found out elsewhere.
                self._session.resend()
            clear_slots(seat.place)

    def on_time(self, now_s: float) -> None:
        """Do what its time has come for."""
        for seat in self._seats:
            if seat.reader is None:
                if seat.next_s is not None and now_s >= seat.next_s:
                    self._start(seat, now_s)
            elif seat.end_by_s is not None:
                if now_s >= seat.end_by_s:
                    seat.reader.kill("it did not end by itself")
                    seat.end_by_s = now_s + END_LIMIT_S
            elif seat.watchdog.due_s is not None and now_s >= seat.watchdog.due_s:
                self._watch(seat, seat.reader, now_s)

    def _start(self, seat: Seat, now_s: float) -> None:
        seat.started_s, seat.next_s = now_s, None
        try:
            seat.reader = ReaderProcess(seat.number, seat.place, self._lock_fd)
        except OSError as exc:
            self._tell_none(f"cannot start one: {exc.strerror}")
            seat.next_s = now_s + BACKOFF_MAX_S
            return
        self.reason = ""
        set_oom_score(seat.reader.pid, self._oom_score)

    def _watch(self, seat: Seat, reader: ReaderProcess, now_s: float) -> None:
        number = seat.watchdog.tick(now_s)
        if number is not None:
            reader.send({"type": "ping", "n": number})
            return
        seat.watchdog.end()
        log.error("reader %d hangs: it answers nothing for %g s; killing it", seat.number, self._watchdog_s)
        reader.kill(f"hung for {self._watchdog_s:g} s")

    # --- for the keeper ---------------------------------------------------------------------------------

    def end(self) -> None:
        """Kill all that run: the session is over, or the next keeper goes on with their places."""
        for seat in self._seats:
            if seat.reader is not None:
                seat.reader.kill("it is not needed any more")
        for seat in self._seats:
            if seat.reader is not None:
                seat.reader.wait(END_LIMIT_S)
                seat.reader.close()
                seat.reader = None
            seat.cut()
            for fd in seat.place:
                os.close(fd)
        self._seats = []

    def status(self) -> dict[str, Any]:
        """How many there are, and what became of others."""
        running = [seat.reader for seat in self._seats if seat.reader is not None]
        return {
            "readers": sum(reader.is_ready for reader in running),
            "readers_wanted": self._wanted,
            "reader_pids": [reader.pid for reader in running],
            "reader_deaths": self._deaths,
            "readers_reason": self.reason,
        }

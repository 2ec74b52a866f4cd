"""The server that has the session: it begins, is watched, and is asked to stop. Standard library only."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Protocol

from basefs.keeper_handover import Handover, Reason
from basefs.keeper_restarts import Restarts
from basefs.keeper_upgrade import options_of
from basefs.keeper_watchdog import Watchdog
from basefs.server_process import END_LIMIT_S, ServerProcess

log = logging.getLogger("basefs.keeper")


class Lock(Protocol):
    """What of the cache directory's lock the servers need."""

    fd: int

    def note_server(self, server_pid: int) -> None:
        """Say which server holds the lock now."""


class ActiveServer:
    """At most one server that has the session or is about to get it, and the watchdog over it."""

    def __init__(self, handover: Handover, restarts: Restarts, lock: Lock) -> None:
        self._handover = handover
        self._restarts = restarts
        self._lock = lock
        self._watchdog = Watchdog()
        self.server: ServerProcess | None = None
        self.reason: Reason = "first"
        """Why it is, or the next one will be, the one."""
        self.reader_places: Callable[[], int] = int
        """How many readers may take requests beside it."""

    @property
    def is_ready(self) -> bool:
        """Whether there is one, and it serves."""
        return self.server is not None and self.server.stage == "ready"

    @property
    def due_s(self) -> float | None:
        """When to call `watch` next (time.monotonic()); None while no server is watched."""
        return self._watchdog.due_s

    def take_over(self, server: ServerProcess, *, limit_s: float) -> None:
        """From now on this one. If it is loaded it comes to `ready` within `limit_s`; else `begin` it when it is."""
        self.server = server
        # A full disk must not keep a mount without a server.
        with contextlib.suppress(OSError):
            self._lock.note_server(server.pid)
        server.set_nice(0)
        if server.stage == "loaded":
            self.begin(limit_s=limit_s)

    def begin(self, *, limit_s: float) -> None:
        """It is loaded: hand over to it."""
        assert self.server is not None
        restarts = self._restarts
        self._handover.may_resend = restarts.may_resend
        begin = {"restarts": restarts.deaths, "reason": self.reason, "last_death": restarts.last_death}
        begin["reader_places"] = self.reader_places()
        self._handover.begin(self.server, begin, limit_s=limit_s)

    def serves(self, now_s: float, *, watchdog_s: float) -> None:
        """It has come to serve: watch it."""
        self._watchdog.begin(now_s, watchdog_s)

    def ended(self) -> None:
        """It ended: there is none."""
        self.server = None
        self._watchdog.end()

    def stop(self) -> None:
        """Have it end by itself, within END_LIMIT_S, for another one to take over."""
        self._watchdog.end()
        if self.server is not None:
            self.server.send({"type": "stop"})
            self.server.expect("stopping", "its end")
            self.server.set_limit(END_LIMIT_S)

    def pong(self, message: dict[str, Any]) -> None:
        """It answered a ping."""
        self._watchdog.pong(message.get("n"))

    def watch(self, now_s: float) -> None:
        """Send it a ping, or kill it if it has left too many unanswered."""
        assert self.server is not None
        number = self._watchdog.tick(now_s)
        if number is not None:
            self.server.send({"type": "ping", "n": number})
            return
        limit_s = self._watchdog.limit_s
        self._watchdog.end()
        log.error("server %d hangs: it answers nothing for %g s; killing it", self.server.pid, limit_s)
        self.server.is_hung = True
        self.server.kill(f"hung for {limit_s:g} s")

    def last_answer_s(self, server: ServerProcess, now_s: float) -> float:
        """When it last gave a sign of life, as far as is known."""
        return now_s - self._watchdog.limit_s if server.is_hung else now_s

    def option(self, name: str, otherwise: float) -> float:
        """One of its options as a number."""
        text = options_of(self.server).get(name) if self.server is not None else None
        try:
            return float(text) if text is not None else otherwise
        except ValueError:
            return otherwise

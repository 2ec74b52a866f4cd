"""The server that waits in place of the one that serves: when it is started, kept, replaced. Standard library only."""

import logging
import time
from collections.abc import Callable

from basefs.keeper_servers import ServerFailedError
from basefs.server_process import ServerProcess

log = logging.getLogger("basefs.keeper")

AFTER_S = 1.0
"""Readers that waited for the server come first."""
BACKOFF_S = (1.0, 5.0, 30.0, 60.0)


class Standby:
    """At most one server that has imported everything, and waits; what becomes of it is no event for the mount.

    `start` gives a server that loads, or raises ServerFailedError.
    """

    def __init__(self, start: Callable[[], ServerProcess]) -> None:
        self._start_server = start
        self.server: ServerProcess | None = None
        self._next_s: float | None = None
        self._ends_s: float | None = None
        self._failures = 0

    @property
    def is_way_back(self) -> bool:
        """Whether it is the old version's, kept until the new one was steady."""
        return self._ends_s is not None

    @property
    def is_loading(self) -> bool:
        """Whether there is one that cannot take over yet."""
        return self.server is not None and self.server.stage == "loading"

    def due_s(self) -> float | None:
        """When `on_time` has something to do (time.monotonic()), None: never."""
        return min((time_s for time_s in (self._next_s, self._ends_s) if time_s is not None), default=None)

    def on_time(self, now_s: float) -> None:
        """Start one, or end the old version's, if its time has come."""
        if self._ends_s is not None and now_s >= self._ends_s and self.server is not None:
            log.info("the old version's standby ends; one of the new version takes its place")
            self._ends_s = None
            self.server.kill("replaced")
            self._failures = 0
        if self._next_s is not None and now_s >= self._next_s:
            self._start()

    def serves(self, now_s: float) -> None:
        """A server has come to serve: soon another one is to wait in its place."""
        if self.server is None:
            self._next_s = now_s + AFTER_S

    def is_needed_now(self) -> None:
        """Start the one that is due, unless those before it failed: an upgrade wants a way back."""
        if self.server is None and self._next_s is not None and not self._failures:
            self._start()

    def keep_until(self, time_s: float) -> None:
        """It is the old version's, and the way back until then."""
        self._ends_s = time_s

    def take(self) -> ServerProcess | None:
        """The server, which is the standby no more; None if there is none that can take over."""
        server = self.server
        if server is None or server.stage == "ending":
            return None
        self.server = self._ends_s = None
        return server

    def loaded(self) -> None:
        """It can take over."""
        self._failures = 0

    def ended(self, server: ServerProcess) -> None:
        """It ended; another one is tried, later each time."""
        self.server = self._ends_s = None
        if self._failures == 1:
            log.warning("no server can wait in place of the one that serves: %s", server.failure)
        self._next_s = time.monotonic() + BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
        self._failures += 1

    def _start(self) -> None:
        self._next_s = None
        if self.server is not None:
            return
        try:
            self.server = self._start_server()
        except ServerFailedError:
            self._next_s = time.monotonic() + BACKOFF_S[-1]

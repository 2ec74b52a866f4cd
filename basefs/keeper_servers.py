"""The servers that run: started, heard, timed, reaped. What they are for is the keeper's business. Stdlib only."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from basefs.errors import BasefsError
from basefs.hardening import set_oom_score
from basefs.keeper_handover import Event, Handover
from basefs.keeper_spec import KeeperSpec
from basefs.server_process import END_LIMIT_S, ServerProcess, describe_exit, may_raise_priority

MESSAGES_A_WAKE = 100
"""A server that talks without end must not keep the others waiting."""


class ServerFailedError(BasefsError):
    """A server did not come to serve; the message says why."""


class Happening(NamedTuple):
    """What a server did: `loaded`, `ready`, `pong` with their message, or `ended` (it is closed then)."""

    kind: Event | str
    server: ServerProcess
    message: dict[str, Any]


class Servers:
    """Every server process, by what its keeper has to wait for."""

    def __init__(self, spec: KeeperSpec, handover: Handover, *, lower_fd: int, lock_fd: int, oom_score: int) -> None:
        self._spec = spec
        self._handover = handover
        self._fds = {"lower_fd": lower_fd, "lock_fd": lock_fd}
        self._oom_score = oom_score
        self._may_nice = may_raise_priority()
        self._running: list[ServerProcess] = []

    def start(
        self, *, nice: int, limit_s: float, is_standby: bool, config_fd: int | None, config_failure: str
    ) -> ServerProcess:
        """A server that says `loaded` within `limit_s`; `config_fd` has the last configuration that worked.

        With a `config_failure` it is to use that one. `is_standby`: nobody waits for it.

        Raises:
            ServerFailedError: The program cannot be started.
        """
        spec = self._spec
        arguments = {
            "keeper_pid": os.getpid(),
            "config_files": spec.config_files,
            "config_dirs": spec.config_dirs,
            "config_failure": config_failure,
            "is_standby": is_standby,
            "fixed": {"mountpoint": spec.mountpoint, "cache_dir": spec.cache_dir, "view": spec.view},
        }
        fds = self._fds if config_fd is None else {**self._fds, "config_fd": config_fd}
        try:
            server = ServerProcess(spec.server_command, arguments, fds=fds, nice=nice if self._may_nice else 0)
        except OSError as exc:
            raise ServerFailedError(f"cannot start {spec.server_command[0]}: {exc.strerror}") from None
        set_oom_score(server.pid, self._oom_score)
        server.set_limit(limit_s)
        self._running.append(server)
        return server

    def fds(self) -> list[int]:
        """What to wait for; pass what became readable to `handle`."""
        found = []
        for server in self._running:
            found.append(server.pidfd)
            if not server.is_silent:
                found.append(server.control.fileno())
            if server.stage == "answering":
                found.append(server.session.fileno())
        return found

    def due_s(self) -> float | None:
        """When the first deadline passes (time.monotonic()): call `handle` then, too."""
        return min((server.deadline_s for server in self._running if server.deadline_s is not None), default=None)

    def handle(self, ready: set[int]) -> Iterator[Happening]:
        """What the servers did. Between two of them the caller may start, hand over to, or kill others.

        Raises:
            MountError: The first mount cannot be made.
        """
        for server in list(self._running):
            has_ended = server.pidfd in ready
            if has_ended or server.control.fileno() in ready:
                yield from self._hear(server, None if has_ended else MESSAGES_A_WAKE)
            if server.stage == "answering" and server.session.fileno() in ready:
                self._take_init_answer(server)
            if has_ended or (server.is_overdue() and server.is_killed):
                yield self._reap(server)
            elif server.is_overdue():
                server.kill(f"the server hangs: no {server.waits_for} within {server.limit_s:g} s")

    def end_all(self, *, grace_s: float) -> None:
        """Wait for the end of what runs, kill it after `grace_s` seconds. Nothing is left running."""
        for server in list(self._running):
            server.wait(grace_s)
            self._reap(server)

    def _hear(self, server: ServerProcess, messages_max: int | None) -> Iterator[Happening]:
        """The messages that are there. A dead server's are read to the last one: they outlive it."""
        while messages_max is None or messages_max > 0:
            received = server.receive()
            if received is None:
                break
            message, fds = received
            try:
                kind = self._handover.on_message(server, message, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            if kind is not None:
                yield Happening(kind, server, message)
            messages_max = None if messages_max is None else messages_max - 1
        if server.is_silent and server.stage not in ("ready", "stopping", "ending"):
            _await_end(server)

    def _take_init_answer(self, server: ServerProcess) -> None:
        try:
            self._handover.on_init_answer(server)
        except OSError:
            _await_end(server)

    def _reap(self, server: ServerProcess) -> Happening:
        stage, waits_for = server.stage, server.waits_for
        self._running.remove(server)
        server.close()
        if not server.failure:
            how = describe_exit(server.exit_code)
            is_done = stage in ("ready", "stopping")
            server.failure = how if is_done else f"the server ended ({how}) before {waits_for!r}"
        return Happening("ended", server, {})


def _await_end(server: ServerProcess) -> None:
    """A server that closed a socket is about to end, and to say why by its exit code."""
    server.expect("ending", server.waits_for)
    server.set_limit(END_LIMIT_S)

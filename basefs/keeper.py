"""The keeper: owns /dev/fuse, the mount and the lock; starts servers and starts them again. Standard library only.

Invariants:
- The `/dev/fuse` fd stays open here until the session has ended: while it is open, a dead server means waiting
  requests, never ENOTCONN.
- A mount exists only after a server said `prepared`; until the first `ready` every failure takes it away again.
- After the first `ready` the mount is taken away only by somebody's unmount, ours at SIGTERM included, and never
  while a file on it is open.
- Nothing here opens, stats or lists the mount point once it is mounted: our own server would have to answer.

- A session that systemd kept for us is one that has served: it is never taken away because we fail.

`python -m basefs.keeper SPEC` with SPEC = the JSON of a `KeeperSpec`; exit code 0 when the mount was ended as asked,
1 when there is or was none to serve, 75 when it waits, mounted, for the next keeper (SIGUSR1).
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from dataclasses import replace

from basefs import hardening
from basefs.errors import BasefsError, MountError
from basefs.keeper_log import set_up_log
from basefs.keeper_predecessors import end_predecessors
from basefs.keeper_session_store import Adopted, SessionStore, adopt_session
from basefs.keeper_setup import CacheLock, open_lower_directory, tune_mount
from basefs.keeper_spec import KeeperSpec
from basefs.keeper_wakeups import Wakeups
from basefs.kernel_session import INIT_BYTES_MAX, KernelSession
from basefs.server_process import ServerProcess, describe_exit
from basefs.service_manager import tell_systemd

log = logging.getLogger("basefs.keeper")

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
STEADY_S = 10.0
"""A server that lived that long starts the back-off anew."""
SERVER_END_S = 5.0
"""What a server has to end by itself once its session is over."""
DETACHED_POLL_S = 0.5
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PARK_SIGNAL = signal.SIGUSR1
"""Sent by the unit's ExecStop= when the stop is the first half of a restart (basefs unmount --for-systemd)."""
PARKED_EXIT_CODE = 75


class _ServerFailedError(BasefsError):
    """A server did not come to serve; the message says why."""


class _SessionEndedError(BasefsError):
    """The FUSE session is over, so there is nothing left to serve."""


class _ParkedError(BasefsError):
    """We make way; the mount waits for the next one, which systemd starts and gives our fds."""


def _failed(message: dict[str, object]) -> _ServerFailedError:
    return _ServerFailedError(str(message.get("error", "the server failed without saying why")))


class Keeper:
    """One mount from its beginning to its end: `run()` once."""

    def __init__(self, spec: KeeperSpec) -> None:
        self._spec = spec
        self._session: KernelSession | None = None
        self._is_serving = False
        self._is_detached = False
        self._last_failure = ""
        self._wakeups = Wakeups((*STOP_SIGNALS, signal.SIGHUP, PARK_SIGNAL))
        self._store = SessionStore()
        self._server_oom_score = 0

    def run(self) -> int:
        """Mount, or adopt the session that systemd kept; serve; the exit code once the mount was ended as asked.

        Raises:
            MountError: It could not be mounted or served; nothing is left behind.
        """
        self._store, adopted = adopt_session()
        if adopted is not None:
            self._adopt(adopted)
        self._server_oom_score = hardening.never_kill_me()
        spec = self._spec
        lock_fd = -1 if adopted is None else adopted.lock_fd
        with CacheLock(spec.cache_dir, spec.mountpoint, lock_fd) as lock:
            lower_fd = open_lower_directory(spec.mountpoint) if adopted is None else adopted.lower_fd
            hardening.lock_memory()
            try:
                self._serve(lower_fd, lock)
            except _ServerFailedError as exc:
                raise MountError(str(exc)) from None
            except _ParkedError:
                log.info("%s stays mounted for the next keeper; ending", spec.mountpoint)
                return PARKED_EXIT_CODE
            finally:
                os.close(lower_fd)
        return 0

    def _adopt(self, adopted: Adopted) -> None:
        """Go on with the session of an earlier keeper, under the paths that it began with."""
        saved = adopted.saved
        if (self._spec.mountpoint, self._spec.cache_dir) != (saved.mountpoint, saved.cache_dir):
            log.warning(
                "mounted already: mountpoint %s and cache_dir %s stay until it is unmounted",
                saved.mountpoint,
                saved.cache_dir,
            )
        self._spec = replace(self._spec, mountpoint=saved.mountpoint, cache_dir=saved.cache_dir)
        self._session = adopted.session
        self._is_serving = True
        self._is_detached = not adopted.session.is_mounted()
        log.info("going on with the mount on %s, which systemd kept", saved.mountpoint)
        # Names and reads wait from now on and do not fail: that is what our unit is ordered before others for.
        tell_systemd("READY=1")
        end_predecessors(adopted.lock_fd)

    # --- servers, one after the other ---------------------------------------------------------------

    def _serve(self, lower_fd: int, lock: CacheLock) -> None:
        self._to_store = {"lower": lower_fd, "lock": lock.fd}
        backoff_s = BACKOFF_FIRST_S
        try:
            while True:
                started_at_s = time.monotonic()
                try:
                    self._run_server(lower_fd, lock)
                except (_ServerFailedError, MountError) as exc:
                    if not self._is_serving:
                        raise
                    self._log_failure(str(exc))
                if time.monotonic() - started_at_s > STEADY_S:
                    backoff_s = BACKOFF_FIRST_S
                self._wait(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
        except _SessionEndedError:
            self._finish()
        finally:
            if not self._is_serving and self._session is not None:
                self._store.clear()
                self._session.abandon()

    def _run_server(self, lower_fd: int, lock: CacheLock) -> None:
        """One server from its start to its end. Any other exception than these is a bug, and leaves it serving.

        Raises:
            _ServerFailedError, MountError: It did not come to serve.
            _SessionEndedError: Nothing is left to serve.
        """
        try:
            server = self._start(lower_fd, lock)
        except OSError as exc:
            raise _ServerFailedError(f"cannot start {self._spec.server_command[0]}: {exc.strerror}") from None
        try:
            self._hand_over(server)
            self._became_ready(server)
            self._wait_for_end(server)
        except (_ServerFailedError, _SessionEndedError, _ParkedError, MountError):
            self._reap(server)
            raise
        except OSError as exc:
            self._reap(server)
            raise _ServerFailedError(f"handing over to server {server.pid}: {exc}") from None
        self._reap(server)

    def _start(self, lower_fd: int, lock: CacheLock) -> ServerProcess:
        spec = self._spec
        arguments = {
            "keeper_pid": os.getpid(),
            "config_files": spec.config_files,
            "config_dirs": spec.config_dirs,
        }
        server = ServerProcess(spec.server_command, arguments, lower_fd=lower_fd, lock_fd=lock.fd)
        hardening.set_oom_score(server.pid, self._server_oom_score)
        # A full disk must not keep a mount without a server.
        with contextlib.suppress(OSError):
            lock.note_server(server.pid)
        return server

    def _hand_over(self, server: ServerProcess) -> None:
        """Bring the server to `ready` (docs/DESIGN.md, section 1), within `start_deadline_s`."""
        deadline = time.monotonic() + self._spec.start_deadline_s
        self._expect(server, "prepared", deadline)
        is_first = self._session is None
        if self._session is None:
            self._session = KernelSession(self._spec.mountpoint)
            self._session.mount()
        session = self._session
        server.send({"type": "serve"}, [session.fd])
        answer = self._play_init(server, session, deadline)
        if is_first:
            session.answer_init(answer)
            self._store.save(session, self._to_store, cache_dir=self._spec.cache_dir, fixed={})
        else:
            session.resend()
        server.send({"type": "switch"})
        self._expect(server, "ready", deadline)

    def _play_init(self, server: ServerProcess, session: KernelSession, deadline: float) -> bytes:
        """The server's answer to the kernel's FUSE_INIT, asked over the session socket."""
        try:
            server.session.send(session.init_request)
            self._wait_for_fd(server, server.session.fileno(), "the answer to FUSE_INIT", deadline)
            answer = server.session.recv(INIT_BYTES_MAX)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        if not answer:
            raise self._premature_end(server, "the answer to FUSE_INIT")
        return answer

    def _expect(self, server: ServerProcess, wanted: str, deadline: float) -> None:
        """Wait for the message `wanted`; a `failed`, an end or a late server is a _ServerFailedError."""
        self._wait_for_fd(server, server.control.fileno(), wanted, deadline)
        message = server.receive()
        if message is None:
            raise self._premature_end(server, wanted)
        if message.get("type") == "failed":
            raise _failed(message)
        if message.get("type") != wanted:
            raise _ServerFailedError(f"the server said {message.get('type')!r} instead of {wanted!r}")

    def _wait_for_fd(self, server: ServerProcess, fd: int, what: str, deadline: float) -> None:
        """Wait until `fd` is readable. What it holds is read before the server's end is looked at."""
        while True:
            rest_s = deadline - time.monotonic()
            ready = self._poll([fd, server.pidfd], rest_s)
            if fd in ready:
                return
            if server.pidfd in ready:
                raise self._premature_end(server, what)
            if rest_s <= 0:
                raise _ServerFailedError(f"the server hangs: no {what} within {self._spec.start_deadline_s:g} s")

    def _premature_end(self, server: ServerProcess, before: str) -> _ServerFailedError:
        """The error for a server that closed its sockets or ended, in its own words if it left some."""
        exit_code = server.wait(limit_s=SERVER_END_S)
        while (message := server.receive()) is not None:
            if message.get("type") == "failed":
                return _failed(message)
        return _ServerFailedError(f"the server ended ({describe_exit(exit_code)}) before {before!r}")

    def _became_ready(self, server: ServerProcess) -> None:
        assert self._session is not None
        if self._is_serving:
            log.info("server %d serves %s again", server.pid, self._spec.mountpoint)
        else:
            self._is_serving = True
            tune_mount(self._session.entry, self._spec.read_ahead_kib, self._spec.max_background)
            log.info("server %d serves %s", server.pid, self._spec.mountpoint)
            self._answer_background({"ready": True, "keeper_pid": os.getpid(), "server_pid": server.pid})
            tell_systemd("READY=1")
        self._last_failure = ""
        tell_systemd(f"STATUS=serving {self._spec.mountpoint}, server {server.pid}")

    def _wait_for_end(self, server: ServerProcess) -> None:
        """Returns when the server died and its session goes on."""
        while server.pidfd not in self._poll([server.pidfd], None):
            pass
        exit_code = server.wait(limit_s=SERVER_END_S)
        self._check_session()
        log.error("server %d died (%s); starting another", server.pid, describe_exit(exit_code))
        tell_systemd(f"STATUS=server died ({describe_exit(exit_code)}), starting another")

    def _reap(self, server: ServerProcess) -> None:
        """No server is left running beside the next one, nor after the mount."""
        is_over = self._is_serving and self._session is not None and self._session.has_ended()
        server.wait(limit_s=SERVER_END_S) if is_over else server.end(grace_s=SERVER_END_S)
        server.close()

    def _log_failure(self, text: str) -> None:
        if self._is_serving and text != self._last_failure:
            log.error("%s; trying again", text)
            self._last_failure = text

    # --- waiting --------------------------------------------------------------------------------------

    def _poll(self, fds: list[int], limit_s: float | None) -> set[int]:
        """Those of `fds` that are readable; empty after `limit_s`, or after a signal or a change of mounts.

        Raises:
            _SessionEndedError: Meanwhile the session ended.
            _ServerFailedError: A signal asked to stop before anything was served.
        """
        # A lazily unmounted session ends at its last close, which no fd tells: look again and again.
        if self._is_detached:
            limit_s = DETACHED_POLL_S if limit_s is None else min(limit_s, DETACHED_POLL_S)
        woken = self._wakeups.wait(fds, limit_s)
        if woken.signals:
            self._on_signals(woken.signals)
        if self._is_serving and (woken.mounts_changed or self._is_detached):
            self._on_mounts_changed()
        return woken.ready

    def _wait(self, limit_s: float) -> None:
        """Let `limit_s` pass, unless the session ends."""
        end = time.monotonic() + limit_s
        while (rest_s := end - time.monotonic()) > 0:
            self._check_session()
            self._poll([], rest_s)

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGHUP in numbers:
            log.warning("SIGHUP: this version does not reload its configuration; unmount and mount again")
        if not any(number in numbers for number in (*STOP_SIGNALS, PARK_SIGNAL)):
            return
        if not self._is_serving:
            raise _ServerFailedError("stopped by a signal before it served")
        self._try_unmount(may_park=PARK_SIGNAL in numbers and self._store.is_stored)

    def _check_session(self) -> None:
        """Raise _SessionEndedError once the session is over."""
        assert self._session is not None
        if self._session.has_ended():
            raise _SessionEndedError

    def _on_mounts_changed(self) -> None:
        assert self._session is not None
        self._check_session()
        if not self._is_detached and not self._session.is_mounted():
            self._is_detached = True
            log.info("%s was unmounted lazily; serving until its last file is closed", self._spec.mountpoint)

    # --- the end --------------------------------------------------------------------------------------

    def _try_unmount(self, *, may_park: bool) -> None:
        """The stop that a signal asks for: the mount goes, or everything stays as it is.

        Raises:
            _ParkedError: With `may_park`, if the mount is in use.
        """
        assert self._session is not None
        mountpoint = self._spec.mountpoint
        tell_systemd("STOPPING=1")
        try:
            self._session.unmount()
        except MountError as exc:
            if may_park:
                raise _ParkedError from None
            log.warning("not stopped, serving on: %s", exc)
            tell_systemd(f"READY=1\nSTATUS=serving {mountpoint}; a stop was refused: {exc}")
            return
        self._check_session()

    def _finish(self) -> None:
        """After the end of the session: nothing is left on the mount point."""
        assert self._session is not None
        self._store.clear()
        if self._session.is_mounted():
            self._session.abandon()
            raise MountError(f"the FUSE connection of {self._spec.mountpoint} was aborted; its mount was removed")
        log.info("%s: unmounted, ending", self._spec.mountpoint)
        tell_systemd("STOPPING=1")

    def _answer_background(self, answer: dict[str, object]) -> None:
        """Tell the waiting `basefs mount --background`, once."""
        if self._spec.ready_fd is None:
            return
        with contextlib.suppress(OSError):
            os.write(self._spec.ready_fd, json.dumps(answer).encode())
            os.close(self._spec.ready_fd)

    def fail(self, text: str) -> None:
        """Report why there is no mount: on the pipe of `--background`, else on stderr."""
        log.error("%s", text)
        if not self._is_serving:
            self._answer_background({"ready": False, "error": text})


def main() -> None:
    """Entry point of `python -m basefs.keeper`."""
    set_up_log()
    hardening.forbid_core_files()
    keeper = Keeper(KeeperSpec(**json.loads(sys.argv[1])))
    try:
        sys.exit(keeper.run())
    except MountError as exc:
        keeper.fail(str(exc))
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The keeper: owns /dev/fuse, the mount and the lock; starts servers and starts them again. Standard library only.

Invariants:
- The `/dev/fuse` fd stays open here until the session has ended: while it is open, a dead server means waiting
  requests, never ENOTCONN.
- A mount exists only after a server said `prepared`; until the first `ready` every failure takes it away again.
- After the first `ready` the mount is taken away only by somebody's unmount, ours at SIGTERM included, and never
  while a file on it is open.
- Nothing here opens, stats or lists the mount point once it is mounted: our own server would have to answer.
- A session that systemd kept for us is one that has served: it is never taken away because we fail.
- One loop waits for everything (`_wait`); nothing else here waits for a server, a client or a disk.

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
from typing import Any

from basefs import hardening
from basefs.errors import BasefsError, MountError
from basefs.keeper_crew import Crew
from basefs.keeper_held import raise_fd_limit
from basefs.keeper_log import set_up_log
from basefs.keeper_predecessors import end_predecessors
from basefs.keeper_requests import Request, RequestSocket
from basefs.keeper_session_store import Adopted, SessionStore, adopt_session
from basefs.keeper_setup import CacheLock, ReadyPipe, open_lower_directory, tune_mount
from basefs.keeper_spec import KeeperSpec, request_socket_of
from basefs.keeper_wakeups import Wakeups
from basefs.kernel_session import KernelSession, SessionEndedError
from basefs.server_process import ServerProcess
from basefs.service_manager import tell_systemd

log = logging.getLogger("basefs.keeper")

KIB = 1024
DETACHED_POLL_S = 0.5
VOLUMES_KEY = "link-connection/"
"""What a server holds under such keys belongs to volumes that it has to detach at its end."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PARK_SIGNAL = signal.SIGUSR1
"""Sent by the unit's ExecStop= when the stop is the first half of a restart (basefs unmount --for-systemd)."""
PARKED_EXIT_CODE = 75


class _ParkedError(BasefsError):
    """We make way; the mount waits for the next one, which systemd starts and gives our fds."""


class Keeper:
    """One mount from its beginning to its end: `run()` once."""

    def __init__(self, spec: KeeperSpec) -> None:
        self._spec = spec
        self._session = KernelSession(spec.mountpoint)
        self._store = SessionStore()
        self._is_detached = False
        self._ready_pipe = ReadyPipe(spec.ready_fd)
        self._tuned: tuple[int, int] | None = None
        self._requests: RequestSocket | None = None
        self._wakeups = Wakeups((*STOP_SIGNALS, signal.SIGHUP, PARK_SIGNAL))
        self._crew: Crew

    def run(self) -> int:
        """Mount, or adopt the session that systemd kept; serve; the exit code once the mount was ended as asked.

        Raises:
            MountError: It could not be mounted or served; nothing is left behind.
        """
        self._store, adopted = adopt_session()
        if adopted is not None:
            self._adopt(adopted)
        oom_score = hardening.never_kill_me()
        spec = self._spec
        lock_fd = -1 if adopted is None else adopted.lock_fd
        with CacheLock(spec.cache_dir, spec.mountpoint, lock_fd) as lock:
            lower_fd = open_lower_directory(spec.mountpoint) if adopted is None else adopted.lower_fd
            hardening.lock_memory()
            try:
                self._crew = Crew(
                    spec,
                    self._session,
                    self._store.held,
                    lock,
                    lower_fd=lower_fd,
                    oom_score=oom_score,
                    places=self._store.places,
                    keep_place=self._store.keep_place,
                    ready=self._on_ready,
                )
                self._to_store = {"lower": lower_fd, "lock": lock.fd}
                self._serve(is_adopted=adopted is not None)
            except _ParkedError:
                self._crew.stop()
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
        view = str(saved.fixed.get("view", self._spec.view))
        self._spec = self._spec._replace(mountpoint=saved.mountpoint, cache_dir=saved.cache_dir, view=view)
        self._session = adopted.session
        self._is_detached = not adopted.session.is_mounted()
        log.info("going on with the mount on %s, which systemd kept", saved.mountpoint)
        # Names and reads wait from now on and do not fail: that is what our unit is ordered before others for.
        tell_systemd("READY=1")
        self._store.held.before_first_send = lambda: self._succeed(adopted.lock_fd)

    def _succeed(self, lock_fd: int) -> None:
        """End what the keeper before us left running. Its server has served until now, when ours is loaded."""
        end_predecessors(lock_fd)
        self._store.read_channels()

    def _serve(self, *, is_adopted: bool) -> None:
        crew = self._crew
        try:
            if is_adopted:
                crew.is_serving = True
                self._open_requests()
            crew.start("adopted" if is_adopted else "first")
            while True:
                self._wait()
                crew.on_time()
        except MountError:
            crew.readers.end()
            crew.servers.end_all(grace_s=0.0)
            if is_adopted:
                raise
            self._store.clear()
            self._session.abandon()
            raise
        except SessionEndedError:
            has_volumes = self._store.held.has_any(VOLUMES_KEY)
            # First: the server detaches volumes at its end, and a device that somebody holds cannot be taken away.
            self._store.clear()
            crew.end(detaches=has_volumes)
            self._finish()
        finally:
            if self._requests is not None:
                self._requests.close()

    # --- waiting --------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait until something happens, and deal with it.

        Raises:
            SessionEndedError: Meanwhile the session ended.
            MountError: The first server failed, or a signal asked to stop before anything was served.
        """
        crew, requests = self._crew, self._requests
        fds = crew.servers.fds() + crew.readers.fds() + (requests.fds() if requests is not None else [])
        woken = self._wakeups.wait(fds, self._limit_s())
        if woken.signals:
            self._on_signals(woken.signals)
        if crew.is_serving and (woken.mounts_changed or self._is_detached):
            self._on_mounts_changed()
        for happening in crew.servers.handle(woken.ready):
            crew.on(happening)
        crew.readers.handle(woken.ready)
        if requests is not None:
            for request in requests.handle(woken.ready):
                self._on_request(request)

    def _limit_s(self) -> float | None:
        now_s = time.monotonic()
        times = [self._crew.due_s(), self._requests.due_s() if self._requests is not None else None]
        # A lazily unmounted session ends at its last close, which no fd tells: look again and again.
        times.append(now_s + DETACHED_POLL_S if self._is_detached else None)
        first_s = min((time_s for time_s in times if time_s is not None), default=None)
        return None if first_s is None else max(0.0, first_s - now_s)

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGHUP in numbers:
            self._crew.upgrade(_log_upgrade)
        if not any(number in numbers for number in (*STOP_SIGNALS, PARK_SIGNAL)):
            return
        if not self._crew.is_serving:
            raise MountError("stopped by a signal before it served")
        self._try_unmount(may_park=PARK_SIGNAL in numbers and self._store.is_stored)

    def _on_mounts_changed(self) -> None:
        self._session.check()
        if not self._is_detached and not self._session.is_mounted():
            self._is_detached = True
            log.info("%s was unmounted lazily; serving until its last file is closed", self._spec.mountpoint)

    # --- requests ---------------------------------------------------------------------------------------

    def _on_request(self, request: Request) -> None:
        if request.kind == "status":
            request.answer(self._status())
        elif request.kind == "upgrade":
            self._crew.upgrade(request.answer)
        else:
            request.answer({"error": f"the keeper knows no request {request.kind!r}"})

    def _status(self) -> dict[str, Any]:
        status = {"mountpoint": self._spec.mountpoint, **self._crew.status(), "keeper_pid": os.getpid()}
        return status | {"state": "detached"} if self._is_detached else status

    # --- serving ----------------------------------------------------------------------------------------

    def _on_ready(self, server: ServerProcess, is_first: bool) -> None:
        mountpoint = self._spec.mountpoint
        self._tune()
        if is_first:
            log.info("server %d serves %s", server.pid, mountpoint)
            fixed = {"view": self._spec.view}
            self._store.save(self._session, self._to_store, cache_dir=self._spec.cache_dir, fixed=fixed)
            self._open_requests()
            self._ready_pipe.answer({"ready": True, "keeper_pid": os.getpid(), "server_pid": server.pid})
            tell_systemd("READY=1")
        else:
            log.info("server %d serves %s again", server.pid, mountpoint)
        tell_systemd(f"STATUS=serving {mountpoint}, server {server.pid}")

    def _tune(self) -> None:
        """Give the mount the readahead and the background requests that the serving server's configuration says."""
        spec, crew = self._spec, self._crew
        read_ahead_kib = int(crew.option("read_ahead_bytes", spec.read_ahead_kib * KIB)) // KIB
        wanted = (read_ahead_kib, int(crew.option("max_background", spec.max_background)))
        if wanted != self._tuned:
            self._tuned = wanted
            tune_mount(self._session.entry, *wanted)

    def _open_requests(self) -> None:
        path = request_socket_of(self._spec.control_socket)
        if not path:
            return
        try:
            self._requests = RequestSocket(path)
        except OSError as exc:
            log.warning("no status or upgrade over %s: %s", path, exc.strerror)

    # --- the end --------------------------------------------------------------------------------------

    def _try_unmount(self, *, may_park: bool) -> None:
        """The stop that a signal asks for: the mount goes, or everything stays as it is.

        Raises:
            _ParkedError: With `may_park`, if the mount is in use.
        """
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
        self._session.check()

    def _finish(self) -> None:
        """After the end of the session: nothing is left on the mount point."""
        if self._session.is_mounted():
            self._session.abandon()
            raise MountError(f"the FUSE connection of {self._spec.mountpoint} was aborted; its mount was removed")
        log.info("%s: unmounted, ending", self._spec.mountpoint)
        tell_systemd("STOPPING=1")

    def fail(self, text: str) -> None:
        """Report why there is no mount: on the pipe of `--background`, else on stderr."""
        log.error("%s", text)
        self._ready_pipe.answer({"ready": False, "error": text})


def _log_upgrade(answer: dict[str, Any]) -> None:
    """The answer to a SIGHUP, which has nobody to be given to."""
    if answer.get("upgraded"):
        log.info("upgrade: %s", json.dumps(answer))
    else:
        log.warning("upgrade: %s", answer.get("error"))


def _keep_fds_to_ourselves() -> None:
    """No server inherits what we were started with, such as the pipe of `--background` or what systemd stored."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > sys.stderr.fileno():
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name), False)


def main() -> None:
    """Entry point of `python -m basefs.keeper`."""
    set_up_log()
    hardening.forbid_core_files()
    _keep_fds_to_ourselves()
    hardening.keep_files_private()
    raise_fd_limit()
    keeper = Keeper(KeeperSpec(**json.loads(sys.argv[1])))
    try:
        sys.exit(keeper.run())
    except MountError as exc:
        keeper.fail(str(exc))
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The keeper: owns /dev/fuse, the mount and the lock; starts servers and starts them again. Standard library only.

Invariants:
- The `/dev/fuse` fd stays open here until the session has ended: while it is open, a dead server means waiting
  requests, never ENOTCONN.
- A mount exists only after a server said `prepared`; until the first `ready` every failure takes it away again.
- After the first `ready` the mount is taken away only by somebody's unmount, ours at SIGTERM included, and never
  while a file on it is open.
- Nothing here opens, stats or lists the mount point once it is mounted: our own server would have to answer.

`python -m basefs.keeper SPEC` with SPEC = the JSON of a `KeeperSpec`; exit code 0 when the mount was ended as asked,
1 when there is or was none to serve.
"""

import contextlib
import errno
import json
import logging
import os
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass, field

from basefs import mounts, processes
from basefs.errors import BasefsError, MountError
from basefs.keeper_setup import CacheLock, open_lower_directory, tell_systemd, tune_mount
from basefs.server_process import INIT_BYTES_MAX, ServerProcess, describe_exit

log = logging.getLogger("basefs.keeper")

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
STEADY_S = 10.0
"""A server that lived that long starts the back-off anew."""
SERVER_END_S = 5.0
"""What a server has to end by itself once its session is over."""
DETACHED_POLL_S = 0.5
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperSpec:
    """What a keeper is started with. Paths are absolute and resolved; `ready_fd` is the pipe of `--background`."""

    mountpoint: str
    cache_dir: str
    config_files: list[str]
    config_dirs: list[str]
    read_ahead_kib: int = 1024
    max_background: int = 64
    start_deadline_s: float = 60.0
    ready_fd: int | None = None
    server_command: list[str] = field(default_factory=lambda: [sys.executable, "-P", "-m", "basefs.service"])


class _ServerFailedError(BasefsError):
    """A server did not come to serve; the message says why."""


class _SessionEndedError(BasefsError):
    """The FUSE session is over, so there is nothing left to serve."""


def _failed(message: dict[str, object]) -> _ServerFailedError:
    return _ServerFailedError(str(message.get("error", "the server failed without saying why")))


class Keeper:
    """One mount from its beginning to its end: `run()` once."""

    def __init__(self, spec: KeeperSpec) -> None:
        self._spec = spec
        self._fuse_fd = -1
        self._mount: mounts.Mount | None = None
        self._init_request = b""
        self._is_serving = False
        self._is_detached = False
        self._resend_works = True
        self._last_failure = ""
        # A signal only wakes the loop: handlers in C write its number into the pipe.
        self._signal_pipe, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup)
        for number in (*STOP_SIGNALS, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: None)
        self._mountinfo = open("/proc/self/mountinfo", "rb")  # noqa: SIM115  # polled until the process ends

    def run(self) -> None:
        """Mount, serve, and return when the mount was ended as asked.

        Raises:
            MountError: It could not be mounted or served; nothing is left behind.
        """
        spec = self._spec
        with CacheLock(spec.cache_dir, spec.mountpoint) as lock:
            lower_fd = open_lower_directory(spec.mountpoint)
            try:
                self._serve(lower_fd, lock)
            except _ServerFailedError as exc:
                raise MountError(str(exc)) from None
            finally:
                os.close(lower_fd)

    # --- servers, one after the other ---------------------------------------------------------------

    def _serve(self, lower_fd: int, lock: CacheLock) -> None:
        backoff_s = BACKOFF_FIRST_S
        try:
            while True:
                server = self._start(lower_fd, lock)
                try:
                    self._hand_over(server)
                    self._became_ready(server)
                    self._wait_for_end(server)
                except (_ServerFailedError, _SessionEndedError) as exc:
                    self._reap(server)
                    if isinstance(exc, _SessionEndedError) or not self._is_serving:
                        raise
                    self._log_failure(str(exc))
                else:
                    self._reap(server)
                if time.monotonic() - server.started_at_s > STEADY_S:
                    backoff_s = BACKOFF_FIRST_S
                self._wait(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
        except _SessionEndedError as exc:
            self._finish(str(exc))
        finally:
            if not self._is_serving:
                self._abandon_mount()

    def _start(self, lower_fd: int, lock: CacheLock) -> ServerProcess:
        spec = self._spec
        arguments = {
            "keeper_pid": os.getpid(),
            "config_files": spec.config_files,
            "config_dirs": spec.config_dirs,
        }
        try:
            server = ServerProcess(spec.server_command, arguments, lower_fd=lower_fd, lock_fd=lock.fd)
        except OSError as exc:
            raise _ServerFailedError(f"cannot start {spec.server_command[0]}: {exc.strerror}") from None
        lock.write(server_pid=server.pid)
        return server

    def _hand_over(self, server: ServerProcess) -> None:
        """Bring the server to `ready` (docs/DESIGN.md, section 1), within `start_deadline_s`."""
        deadline = time.monotonic() + self._spec.start_deadline_s
        self._expect(server, "prepared", deadline)
        is_first = self._mount is None
        if is_first:
            self._do_mount()
        server.send({"type": "serve"}, [self._fuse_fd])
        answer = self._play_init(server, deadline)
        if is_first:
            self._answer_kernel(answer)
        else:
            self._resend()
        server.send({"type": "switch"})
        self._expect(server, "ready", deadline)

    def _play_init(self, server: ServerProcess, deadline: float) -> bytes:
        """The server's answer to the kernel's FUSE_INIT, asked over the session socket."""
        try:
            server.session.send(self._init_request)
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
        assert self._mount is not None
        if self._is_serving:
            log.info("server %d serves %s again", server.pid, self._spec.mountpoint)
        else:
            self._is_serving = True
            tune_mount(self._mount, self._spec.read_ahead_kib, self._spec.max_background)
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
        self._raise_if_ended()
        log.error("server %d died (%s); starting another", server.pid, describe_exit(exit_code))
        tell_systemd(f"STATUS=server died ({describe_exit(exit_code)}), starting another")

    def _reap(self, server: ServerProcess) -> None:
        """No server is left running beside the next one, nor after the mount."""
        is_over = self._is_serving and self._has_session_ended()
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
        poller = select.poll()
        for fd in (*fds, self._signal_pipe):
            poller.register(fd, select.POLLIN)
        poller.register(self._mountinfo, select.POLLPRI)
        # A lazily unmounted session ends at its last close, which no fd tells: look again and again.
        wait_s = min(
            (s for s in (limit_s, DETACHED_POLL_S if self._is_detached else None) if s is not None), default=None
        )
        events = {fd for fd, _ in poller.poll(None if wait_s is None else max(0.0, wait_s) * 1000)}
        if self._signal_pipe in events:
            self._on_signals(os.read(self._signal_pipe, 64))
        if self._is_serving and (self._mountinfo.fileno() in events or self._is_detached):
            self._on_mounts_changed()
        return events & set(fds)

    def _wait(self, limit_s: float) -> None:
        """Let `limit_s` pass, unless the session ends."""
        end = time.monotonic() + limit_s
        while (rest_s := end - time.monotonic()) > 0:
            self._raise_if_ended()
            self._poll([], rest_s)

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGHUP in numbers:
            log.warning("SIGHUP: this version does not reload its configuration; unmount and mount again")
        if not any(number in numbers for number in STOP_SIGNALS):
            return
        if not self._is_serving:
            raise _ServerFailedError("stopped by a signal before it served")
        self._try_unmount()

    def _on_mounts_changed(self) -> None:
        self._raise_if_ended()
        if not self._is_detached and mounts.mount_by_id(self._mount_id) is None:
            self._is_detached = True
            log.info("%s was unmounted lazily; serving until its last file is closed", self._spec.mountpoint)

    # --- the mount --------------------------------------------------------------------------------------

    @property
    def _mount_id(self) -> int:
        return self._mount.mount_id if self._mount is not None else -1

    def _do_mount(self) -> None:
        mountpoint = self._spec.mountpoint
        try:
            self._fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise _ServerFailedError(f"cannot open /dev/fuse: {exc.strerror} (is the module fuse loaded?)") from None
        try:
            mounts.mount_fuse(self._fuse_fd, mountpoint)
        except OSError as exc:
            raise _ServerFailedError(f"cannot mount on {mountpoint}: {exc.strerror}") from None
        self._mount = mounts.mount_at(mountpoint)
        if sum(mount.is_basefs and mount.mountpoint == mountpoint for mount in mounts.mount_table()) > 1:
            raise _ServerFailedError(f"another basefs was mounted on {mountpoint} at the same moment")
        # The kernel sends FUSE_INIT once, at the mount; every later server is played the same bytes.
        self._init_request = os.read(self._fuse_fd, INIT_BYTES_MAX)

    def _answer_kernel(self, answer: bytes) -> None:
        try:
            os.write(self._fuse_fd, mounts.without_auto_invalidation(answer))
        except OSError as exc:
            raise _ServerFailedError(f"the kernel does not take the answer to FUSE_INIT: {exc.strerror}") from None

    def _resend(self) -> None:
        """Have the kernel hand out again what the dead server had taken. The next one has read nothing yet."""
        try:
            os.write(self._fuse_fd, mounts.FUSE_NOTIFY_RESEND)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                self._raise_if_ended()
                raise
            if self._resend_works:
                log.warning(
                    "this kernel cannot resend requests (Linux 6.9 can): what a dead server had taken and not "
                    "answered stays unanswered until its caller is killed"
                )
                self._resend_works = False

    def _has_session_ended(self) -> bool:
        poller = select.poll()
        poller.register(self._fuse_fd, 0)
        # Asked when there is reason to, never polled on: the kernel would wake us at every request.
        return any(event & select.POLLERR for _, event in poller.poll(0))

    def _raise_if_ended(self) -> None:
        if self._has_session_ended():
            raise _SessionEndedError("unmounted" if mounts.mount_by_id(self._mount_id) is None else "aborted")

    def _try_unmount(self) -> None:
        """The stop that a signal asks for: the mount goes, or everything stays as it is."""
        mountpoint = self._spec.mountpoint
        top = mounts.mount_at(mountpoint)
        if top is None or top.mount_id != self._mount_id:
            log.warning("not stopped: the topmost mount on %s is not ours", mountpoint)
            return
        tell_systemd("STOPPING=1")
        try:
            mounts.unmount(mountpoint)
        except OSError as exc:
            users = processes.describe_users(processes.users_of(top))
            log.warning("not stopped, serving on: cannot unmount %s: %s: %s", mountpoint, exc.strerror, users)
            tell_systemd(f"READY=1\nSTATUS=serving {mountpoint}; a stop was refused: {users}")
            return
        self._raise_if_ended()

    def _finish(self, how: str) -> None:
        """After the end of the session: nothing is left on the mount point."""
        if how == "aborted":
            self._abandon_mount()
            raise MountError(f"the FUSE connection of {self._spec.mountpoint} was aborted; its mount was removed")
        log.info("%s: %s, ending", self._spec.mountpoint, how)
        tell_systemd("STOPPING=1")

    def _abandon_mount(self) -> None:
        """Remove our mount, whoever uses it, and let the kernel fail what waits for it."""
        if self._mount is not None:
            top = mounts.mount_at(self._spec.mountpoint)
            if top is not None and top.mount_id == self._mount_id:
                mounts.unmount(self._spec.mountpoint, is_lazy=True)
        if self._fuse_fd >= 0:
            os.close(self._fuse_fd)
            self._fuse_fd = -1

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


def command_line(spec: KeeperSpec) -> list[str]:
    """The program to run, or to become, for a keeper of that spec."""
    return [sys.executable, "-P", "-m", processes.KEEPER_MODULE, json.dumps(asdict(spec))]


def main() -> None:
    """Entry point of `python -m basefs.keeper`."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s.%(msecs)03d %(process)d %(levelname)s %(name)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    keeper = Keeper(KeeperSpec(**json.loads(sys.argv[1])))
    try:
        keeper.run()
    except MountError as exc:
        keeper.fail(str(exc))
        sys.exit(1)


if __name__ == "__main__":
    main()

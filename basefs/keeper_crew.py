"""Which server does what: the one that serves, the one that waits in its place, the one of an upgrade. Stdlib only.

Invariants:
- One server at a time has the session. The next one gets it when the last one has ended.
- While a server serves, another one that has imported everything waits (the standby).
- An upgrade ends the old server only when the new one is loaded; the old version's standby stays until the new
  server was steady.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

from basefs.errors import MountError
from basefs.keeper_active import ActiveServer, Lock
from basefs.keeper_handover import Handover, Reason
from basefs.keeper_held import HeldFds
from basefs.keeper_reader_process import Place
from basefs.keeper_readers import Readers
from basefs.keeper_restarts import STEADY_S, Restarts, StartFailures
from basefs.keeper_servers import Happening, ServerFailedError, Servers
from basefs.keeper_spec import KeeperSpec
from basefs.keeper_standby import Standby
from basefs.keeper_upgrade import Answer, Upgrade
from basefs.kernel_session import KernelSession
from basefs.server_process import END_LIMIT_S, ServerProcess
from basefs.service_manager import tell_systemd

log = logging.getLogger("basefs.keeper")

READERS_OPTION = "readers"
CONFIG_KEY = "config"
"""Under which a server that serves gives us the text of its configuration."""
STANDBY_NICE = 10
DETACH_LIMIT_S = 25.0
"""The last server, once the mount is gone, if it has volumes: it detaches them (15 s at most), then ends (5 s)."""
TAKE_OVER_LIMIT_S = 10.0
"""What a new version has from its `begin` to `ready`, while readers wait and the old version could serve them."""


class Crew:
    """The servers of one session. `ready` is called with each server that comes to serve, and if it is the first."""

    def __init__(
        self,
        spec: KeeperSpec,
        session: KernelSession,
        held: HeldFds,
        lock: Lock,
        *,
        lower_fd: int,
        oom_score: int,
        places: dict[int, Place],
        keep_place: Callable[[int, Place], bool],
        ready: Callable[[ServerProcess, bool], None],
    ) -> None:
        self._spec = spec
        self._session = session
        self._held = held
        self._ready = ready
        handover = Handover(session, held)
        self.servers = Servers(spec, handover, lower_fd=lower_fd, lock_fd=lock.fd, oom_score=oom_score)
        self.readers = Readers(session, places, lock_fd=lock.fd, oom_score=oom_score, keep=keep_place)
        handover.before_resend = self._before_resend
        handover.switched = self._switched
        self.is_serving = False
        """Whether a server ever served: from then on none of their failures is the mount's end."""
        self._restarts = Restarts()
        self._failures = StartFailures()
        self._active = ActiveServer(handover, self._restarts, lock)
        self._active.reader_places = self.readers.__len__
        self._standby = Standby(lambda: self._start_server(limit_s=spec.start_deadline_s, is_standby=True))
        self._upgrade: Upgrade | None = None
        self._next_active_s: float | None = None

    # --- the next server --------------------------------------------------------------------------------

    def start(self, reason: Reason) -> None:
        """Have a server take the session: the standby if there is one.

        Raises:
            MountError: The first one cannot be started.
        """
        self._next_active_s = None
        self._active.reason = reason
        was_way_back = self._standby.is_way_back
        server = self._standby.take()
        if server is None:
            try:
                server = self._start_server(limit_s=self._spec.start_deadline_s, is_standby=False)
            except ServerFailedError as exc:
                self._not_started(str(exc))
                return
        elif was_way_back:
            why = self._restarts.last_death
            log.error("upgrade: the new server failed (%s); the old version takes over", why)
        self._active.take_over(server, limit_s=self._spec.start_deadline_s)

    def _start_server(self, *, limit_s: float, is_standby: bool, may_fall_back: bool = True) -> ServerProcess:
        return self.servers.start(
            nice=STANDBY_NICE if is_standby and may_fall_back else 0,
            limit_s=limit_s,
            is_standby=is_standby,
            config_fd=self._held.fd_of(CONFIG_KEY) if may_fall_back else None,
            config_failure=self._failures.suspicion,
        )

    def _not_started(self, why: str) -> None:
        if not self.is_serving:
            raise MountError(why)
        self._failures.not_started(why)
        now_s = time.monotonic()
        self._next_active_s = now_s + self._restarts.died(why, now_s, was_killed=False)

    # --- what servers do --------------------------------------------------------------------------------

    def on(self, happening: Happening) -> None:
        """Go on after what a server did.

        Raises:
            MountError: The first server failed.
            SessionEndedError: Nothing is left to serve.
        """
        server = happening.server
        if happening.kind == "pong":
            if server is self._active.server:
                self._active.pong(happening.message)
        elif happening.kind == "loaded":
            self._on_loaded(server)
        elif happening.kind == "ready":
            self._on_ready(server)
        elif server is self._active.server:
            self._active_ended(server)
        elif server is self._standby.server:
            self._standby.ended(server)
            self._go_on_with_upgrade()
        elif self._upgrade is not None and server is self._upgrade.candidate:
            self._candidate_ended(server, self._upgrade)

    def _on_loaded(self, server: ServerProcess) -> None:
        self._failures.loaded_with(str(server.loaded.get("config_error", "")))
        if server is self._active.server:
            self._active.begin(limit_s=self._spec.start_deadline_s)
        elif server is self._standby.server:
            self._standby.loaded()
        self._go_on_with_upgrade()

    def _on_ready(self, server: ServerProcess) -> None:
        now_s = time.monotonic()
        is_first, self.is_serving = not self.is_serving, True
        self._restarts.became_ready(now_s)
        self._failures.served()
        self._active.serves(now_s, watchdog_s=self.option("watchdog_s", self._spec.watchdog_s))
        self._standby.serves(now_s)
        self._ready(server, is_first)
        watchdog_s = self.option("watchdog_s", self._spec.watchdog_s)
        wanted = int(self.option(READERS_OPTION, 0)) if self.readers.are_known_to(server) else 0
        self.readers.serves(wanted, watchdog_s=watchdog_s, now_s=now_s)
        if self._upgrade is None:
            return
        if self._upgrade.stage == "loading":
            self._go_on_with_upgrade()
            return
        if server is self._upgrade.candidate:
            self._upgrade.succeeded(server)
            self.readers.renew(now_s)
            self._standby.keep_until(now_s + STEADY_S)
        else:
            self._upgrade.failed(self._upgrade.failure, server)
        self._upgrade = None

    def _active_ended(self, server: ServerProcess) -> None:
        self._active.ended()
        self.readers.cut()
        if not self.is_serving:
            raise MountError(server.failure)
        self._session.check()
        if self._upgrade is None or self._upgrade.stage == "loading" or not self._hand_on(server, self._upgrade):
            self._died(server)

    def _died(self, server: ServerProcess) -> None:
        now_s = time.monotonic()
        # Of one that was traced nothing is known, so nothing against what it was handed.
        was_killed = server.exit_code in (-signal.SIGKILL, None) and not server.is_killed
        last_answer_s = self._active.last_answer_s(server, now_s)
        delay_s = self._restarts.died(server.failure, last_answer_s, was_killed=was_killed)
        if server.has_served:
            log.error("server %d died (%s); starting another", server.pid, server.failure)
        else:
            self._failures.not_served(server.failure)
        tell_systemd(f"STATUS=server died ({server.failure}), starting another")
        self._active.reason = "hung" if server.is_hung else "died"
        if delay_s:
            self._next_active_s = now_s + delay_s
        else:
            self.start(self._active.reason)

    # --- upgrades ---------------------------------------------------------------------------------------

    def upgrade(self, answer: Answer) -> None:
        """Replace the server by one of what is installed now; `answer` is called once, when that is decided."""
        if self._upgrade is not None or not self.is_serving:
            answer({"upgraded": False, "error": "not now: a server is being started or replaced already"})
            return
        limit_s = self.option("upgrade_deadline_s", self._spec.upgrade_deadline_s)
        try:
            candidate = self._start_server(limit_s=limit_s, is_standby=True, may_fall_back=False)
        except ServerFailedError as exc:
            answer({"upgraded": False, "error": f"{exc}; the old version serves on"})
            return
        log.info("upgrade: server %d is being loaded", candidate.pid)
        self._upgrade = Upgrade(candidate, self._active.server, answer)

    def _go_on_with_upgrade(self) -> None:
        """Stop the old server once the new one is loaded, and the way back, too, if there is one."""
        upgrade = self._upgrade
        if upgrade is None or upgrade.stage != "loading" or upgrade.candidate.stage != "loaded":
            return
        self._standby.is_needed_now()
        if self._active.server is not None and not self._active.is_ready:
            return  # It has just been started in place of one that died; its `ready` brings us back.
        if self._standby.is_loading:
            return
        upgrade.stops_old()
        if self._active.server is None:
            self._hand_on(None, upgrade)
        else:
            self._active.stop()

    def _hand_on(self, ended: ServerProcess | None, upgrade: Upgrade) -> bool:
        """Give the session to whose turn it is in an upgrade; False when there is nobody."""
        self._active.reason = "upgrade"
        self._next_active_s = None
        failure = ended.failure if ended is not None else ""
        match upgrade.next_holder(failure, has_standby=self._standby.server is not None):
            case "candidate":
                limit_s = min(TAKE_OVER_LIMIT_S, self._spec.start_deadline_s)
                self._active.take_over(upgrade.candidate, limit_s=limit_s)
            case "standby":
                self.start("upgrade")
            case None:
                self._upgrade = None
                upgrade.failed(upgrade.failure or "it ended", None)
                return False
        return True

    def _candidate_ended(self, server: ServerProcess, upgrade: Upgrade) -> None:
        if upgrade.stage == "stopping":
            upgrade.failure = server.failure  # The old server is on its way out; the standby is next.
            return
        self._upgrade = None
        log.error("upgrade: the new server failed: %s; the old one serves on", server.failure)
        upgrade.failed(server.failure, self._active.server)

    # --- time -------------------------------------------------------------------------------------------

    def due_s(self) -> float | None:
        """When `on_time` has something to do (time.monotonic()), None: never."""
        times = (
            self._next_active_s,
            self._standby.due_s(),
            self._active.due_s,
            self._restarts.resend_due_s,
            self.servers.due_s(),
            self.readers.due_s(),
        )
        return min((time_s for time_s in times if time_s is not None), default=None)

    def on_time(self) -> None:
        """Do what its time has come for."""
        now_s = time.monotonic()
        if _has_come(self._next_active_s, now_s):
            self.start(self._active.reason)
        self._standby.on_time(now_s)
        self.readers.on_time(now_s)
        if _has_come(self._active.due_s, now_s):
            self._active.watch(now_s)
        if _has_come(self._restarts.resend_due_s, now_s):
            with contextlib.suppress(OSError):  # The session is ending, which is found out elsewhere.
                self._session.resend()
            self._restarts.resent(now_s)

    # --- for the keeper ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """End all servers, the one that serves by asking it: the session waits for the next keeper's."""
        if self._active.is_ready:
            self._active.stop()
        self.end(detaches=False)

    def end(self, *, detaches: bool) -> None:
        """Wait for the end of the server that has the session, which is over for it; kill the others.

        `detaches`: it has volumes to detach, which takes longer.
        """
        upgrade = self._upgrade
        candidate = None if upgrade is None or upgrade.candidate is self._active.server else upgrade.candidate
        for server in (self._standby.server, candidate):
            if server is not None:
                server.kill("it is not needed any more")
        self.readers.end()
        self.servers.end_all(grace_s=DETACH_LIMIT_S if detaches else END_LIMIT_S)

    def option(self, name: str, otherwise: float) -> float:
        """An option of the server that serves, as a number."""
        return self._active.option(name, otherwise)

    def status(self) -> dict[str, Any]:
        """What there is to tell of the servers, also while none answers."""
        active, standby = self._active.server, self._standby.server
        wait_s = None if self._next_active_s is None else max(0.0, round(self._next_active_s - time.monotonic(), 1))
        return {
            "state": self._state(),
            "server_pid": None if active is None else active.pid,
            "server_version": "" if active is None else active.version,
            "standby_pid": None if standby is None else standby.pid,
            "standby_state": "" if standby is None else standby.stage,
            "standby_version": "" if standby is None else standby.version,
            "deaths": self._restarts.deaths,
            "last_death": self._restarts.last_death,
            "next_try_s": wait_s,
            "resend": self._restarts.may_resend,
            "held_fds": len(self._held),
            "config_error": self._failures.config_error,
            **self.readers.status(),
        }

    def _before_resend(self, server: ServerProcess) -> None:
        self.readers.cut()
        if not self.readers.are_known_to(server):
            self.readers.give_up()

    def _switched(self, server: ServerProcess) -> None:
        if self.readers.are_known_to(server):
            self.readers.connect(server)

    def _state(self) -> str:
        if not self.is_serving:
            return "starting"
        if self._upgrade is not None:
            return "upgrading"
        return "serving" if self._active.is_ready else "restarting"


def _has_come(time_s: float | None, now_s: float) -> bool:
    return time_s is not None and now_s >= time_s

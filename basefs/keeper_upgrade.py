"""What is known of one upgrade while it goes on, and its answer. Standard library only."""

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

from basefs.server_process import ServerProcess

log = logging.getLogger("basefs.keeper")

Stage = Literal["loading", "stopping", "taking over", "falling back"]
Answer = Callable[[dict[str, Any]], None]


class Upgrade:
    """A new server replaces the one that serves, without a moment in which nobody could.

    `loading`: the new server imports and reads the configuration, the old one serves. `stopping`: the old one ends.
    `taking over`: the new one has the session. `falling back`: it failed, and the old version's standby has it.
    """

    def __init__(self, candidate: ServerProcess, old: ServerProcess | None, answer: Answer) -> None:
        self.stage: Stage = "loading"
        self.candidate = candidate
        self.failure = ""
        self._answer = answer
        self._old = (old.pid, old.version, options_of(old)) if old is not None else (None, "", {})
        self._stopped_at_s: float | None = None

    def stops_old(self) -> None:
        """From now on nobody answers."""
        self.stage = "stopping"
        self._stopped_at_s = time.monotonic()

    def next_holder(self, ended_failure: str, *, has_standby: bool) -> Literal["candidate", "standby"] | None:
        """Whose turn it is now that the session has no server: the new one's, then the old version's, then nobody's.

        `ended_failure` says why the last one ended.
        """
        if self.stage == "stopping" and not self.failure:
            self.stage = "taking over"
            return "candidate"
        self.failure = self.failure or ended_failure
        if self.stage == "falling back" or not has_standby:
            return None
        self.stage = "falling back"
        log.error("upgrade: the new server failed (%s); the old version takes over", self.failure)
        return "standby"

    def succeeded(self, server: ServerProcess) -> None:
        """The new server serves."""
        before, now = self._old[2], options_of(server)
        changed = {name: [before.get(name), value] for name, value in now.items() if before.get(name) != value}
        not_applied = server.loaded.get("not_applied")
        self._answer(
            {
                **self._report(server),
                "upgraded": True,
                "applied": changed if before else {},
                "not_applied": not_applied if isinstance(not_applied, list) else [],
            }
        )

    def failed(self, why: str, serving: ServerProcess | None) -> None:
        """The new server does not serve; `serving` does, None if none does now."""
        outcome = "the old version serves on" if serving is not None else "a server is being started again"
        self._answer({**self._report(serving), "upgraded": False, "error": f"{why}; {outcome}"})

    def _report(self, serving: ServerProcess | None) -> dict[str, Any]:
        pid, version, _ = self._old
        gap_s = 0.0 if self._stopped_at_s is None else time.monotonic() - self._stopped_at_s
        return {
            "old_version": version,
            "new_version": self.candidate.version,
            "old_pid": pid,
            "new_pid": self.candidate.pid,
            "serving_pid": None if serving is None else serving.pid,
            "seconds_without_server": round(gap_s, 3),
        }


def options_of(server: ServerProcess) -> dict[str, str]:
    """The options of [basefs] as the server has them; empty before it said so."""
    options = server.loaded.get("options")
    return options if isinstance(options, dict) else {}

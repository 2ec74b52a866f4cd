"""One loaded server on its way to `ready`, message by message (docs/DESIGN.md, section 1). Standard library only."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Literal

from basefs.keeper_held import HeldFds
from basefs.kernel_session import INIT_BYTES_MAX, KernelSession
from basefs.server_process import ServerProcess

log = logging.getLogger("basefs.keeper")

Event = Literal["loaded", "ready", "pong"]
Reason = Literal["first", "died", "hung", "upgrade", "adopted"]


class Handover:
    """Gives loaded servers what they need: held fds, `begin`, the session."""

    def __init__(self, session: KernelSession, held: HeldFds) -> None:
        self._session = session
        self._held = held
        self.may_resend = True
        """Whether the next server to switch gets what dead ones had taken and not answered."""
        self.before_resend: Callable[[ServerProcess], None] = _nothing
        self.switched: Callable[[ServerProcess], None] = _nothing
        """Called before dead servers' requests are handed out again, and when the server may speak to the kernel."""

    def begin(self, server: ServerProcess, begin: dict[str, Any], *, limit_s: float) -> None:
        """Have a loaded server take over; it comes to `ready` within `limit_s` or is killed."""
        server.set_nice(0)
        self._held.send_to(server)
        server.send({"type": "begin", **begin})
        server.expect("preparing", "prepared")
        server.set_limit(limit_s)

    def on_message(self, server: ServerProcess, message: dict[str, Any], fds: list[int]) -> Event | None:
        """What a message of a server means to the keeper; None for what was dealt with here.

        Raises:
            MountError: The first server is prepared, and the mount cannot be made.
        """
        kind = message.get("type")
        if kind in ("hold", "drop"):
            self._keep(message, fds)
        elif kind == "failed":
            server.fail(str(message.get("error", "the server failed without saying why")))
        elif kind == "pong":
            return "pong"
        elif kind != server.waits_for:
            if server.stage not in ("stopping", "ending"):
                server.kill(f"the server said {kind!r} instead of {server.waits_for!r}")
        elif kind == "loaded":
            server.loaded = message
            server.expect("loaded", "")
            server.set_limit(None)
            return "loaded"
        elif kind == "prepared":
            self._serve(server)
        elif kind == "ready":
            server.expect("ready", "")
            server.has_served = True
            server.set_limit(None)
            return "ready"
        return None

    def on_init_answer(self, server: ServerProcess) -> None:
        """Take the server's answer to FUSE_INIT, give the kernel the first one, and let the server speak to it.

        Raises:
            MountError: The kernel does not take the first answer.
            OSError: The server closed its end.
        """
        answer = server.session.recv(INIT_BYTES_MAX)
        if not answer:
            raise ConnectionResetError
        if not self._session.is_answered:
            self._session.answer_init(answer)
        else:
            self.before_resend(server)
            if self.may_resend:
                self._session.resend()
        server.send({"type": "switch"})
        server.expect("switching", "ready")
        self.switched(server)

    def _keep(self, message: dict[str, Any], fds: list[int]) -> None:
        key = str(message.get("key"))
        if message.get("type") == "drop":
            self._held.drop(key)
        elif fds:
            self._held.take(key, message.get("note"), fds.pop(0))

    def _serve(self, server: ServerProcess) -> None:
        session = self._session
        if session.fd < 0:
            session.mount()
        server.send({"type": "serve"}, [session.fd])
        with contextlib.suppress(OSError):  # It is gone, which its pidfd tells.
            server.session.send(session.init_request)
        server.expect("answering", "the answer to FUSE_INIT")


def _nothing(*_: object) -> None:
    """Nobody wants to know."""

"""The Unix socket of the commands: made before anything is mounted, answered once the rest of the service stands.

Standard library only: what answers on it (hypercorn, starlette) takes half as long to import as all the rest.
"""

import logging
import os
import socket
import stat
from pathlib import Path

from basefs.errors import ControlError

log = logging.getLogger(__name__)

BACKLOG = 64


class ControlListener:
    """A listening socket that only its owner may use. `close` it; the file goes then, if it is still ours.

    Raises:
        ControlError: The socket cannot be made, or another server answers on it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _clear_stale(path)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # Before bind, so that the file never has wider rights than these.
                os.fchmod(self._socket.fileno(), 0o600)
                self._socket.bind(os.fspath(path))
                self._socket.listen(BACKLOG)
                self._inode = os.stat(path).st_ino
            except OSError:
                self._socket.close()
                raise
        except OSError as exc:
            raise ControlError(f"cannot make the control socket {path}: {exc.strerror}") from None

    def detach(self) -> int:
        """Hand the descriptor over: whoever takes it closes it."""
        return self._socket.detach()

    def close(self) -> None:
        """Stop listening, unless the descriptor was handed over, and remove the file."""
        self._socket.close()
        try:
            if os.lstat(self._path).st_ino == self._inode:
                self._path.unlink()
        except OSError as exc:
            log.debug("control socket %s: %s", self._path, exc.strerror)


def _clear_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ControlError(f"cannot make the control socket {path}: there is a file that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its backlog is full, so it is alive
    raise ControlError(f"another basefs answers on the control socket {path}")

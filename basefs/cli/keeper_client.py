"""What the keeper says of itself and of its servers, over its own socket: it answers also while no server does."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from basefs.errors import ControlError
from basefs.keeper_spec import request_socket_of

ANSWER_DEADLINE_S = 5.0
ANSWER_BYTES_MAX = 1024 * 1024


def ask_keeper(control_socket: Path, request: str, *, deadline_s: float = ANSWER_DEADLINE_S) -> dict[str, Any]:
    """The keeper's answer to `status` or `upgrade`.

    Raises:
        ControlError: There is none within `deadline_s`; the message says what to do.
    """
    path = request_socket_of(os.fspath(control_socket))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(deadline_s)
            asking.connect(path)
            asking.sendall(json.dumps({"request": request}).encode())
            answer = json.loads(_read_all(asking))
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise ControlError(
            f"no keeper answers on {path}: basefs is not mounted, or its keeper is dead; see `basefs doctor`"
        ) from None
    except PermissionError:
        raise ControlError(f"permission denied on {path}: run the command as its owner, root") from None
    except TimeoutError:
        raise ControlError(f"the keeper does not answer on {path} within {deadline_s:g} s") from None
    except (OSError, ValueError):
        raise ControlError(
            f"the answer on {path} is not a keeper's: it ended, or control_socket is another's"
        ) from None
    if not isinstance(answer, dict):
        raise ControlError(f"the answer on {path} is not a keeper's: is control_socket another program's?")
    return answer


def _read_all(asking: socket.socket) -> bytes:
    data = b""
    while piece := asking.recv(ANSWER_BYTES_MAX):
        data += piece
    return data

"""The process that knows os-brick: `python -m basefs.volumes.helper FD`, started and killed by `brick.py`.

os-brick blocks for minutes, patches `time.sleep`, runs commands as root and may hang for good on a broken device: so
it is never in the server. One JSON request a datagram on the socket FD, answered in turn; a connection comes as a
memfd beside its request, so it is in no argument, and a device goes back as an fd. What os-brick logs goes to stderr,
which the server masks. The process ends with its server: at the socket's end it kills its group, commands included.
"""

import json
import logging
import os
import select
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

from basefs import errors
from basefs.core.safe_text import safe_text
from basefs.volumes.connection import read_connection
from basefs.volumes.served import serve

if TYPE_CHECKING:
    from os_brick.initiator.initiator_connector import InitiatorConnector

REQUEST_BYTES_MAX = 64 * 1024
NO_DISCONNECT = ("local", "nfs", "glusterfs", "quobyte", "scality", "vzstorage")
"""Kinds whose `disconnect_volume` of os-brick does nothing; a mounted share stays mounted."""
USERS_LOOKS = 10
USERS_LOOK_PAUSE_S = 0.2
_TEXT = "%(levelname)s %(name)s: %(message)s"


class _RefusedError(Exception):
    """The volume was connected and cannot be linked; the message is the reason."""


class _WithoutTraceback(logging.Formatter):
    """os-brick logs hundreds of lines about a command that is not installed."""

    def formatException(self, ei: Any) -> str:  # noqa: ANN401, N802  logging's own name
        return f"{ei[0].__name__}: {ei[1]}"


def main() -> None:
    """Answer requests until the server closes its end."""
    with socket.socket(fileno=int(sys.argv[1])) as server:
        threading.Thread(target=_end_with, args=(server,), daemon=True).start()
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_WithoutTraceback(_TEXT))
        logging.basicConfig(handlers=[handler], level=logging.INFO)
        _set_up(lock_path=sys.argv[2])
        while True:
            data, fds, _flags, _address = socket.recv_fds(server, REQUEST_BYTES_MAX, 1)
            if not data:
                return
            for received in fds:
                os.set_inheritable(received, False)
            answer, given = _answer(json.loads(data), fds[0] if fds else None)
            for received in fds:
                os.close(received)
            socket.send_fds(server, [json.dumps(answer, default=str).encode()], given)
            for fd in given:
                os.close(fd)


def _end_with(server: socket.socket) -> None:
    """For a thread: os-brick may be anywhere when the server ends, or is killed."""
    poll = select.poll()
    poll.register(server, select.POLLRDHUP)
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def _set_up(lock_path: str) -> None:
    warnings.simplefilter("ignore")  # of libraries, about each other
    import os_brick
    from os_brick import privileged
    from os_brick.initiator import connector as _connectors  # noqa: F401  the bulk of the import, before it is needed
    from oslo_concurrency import lockutils
    from oslo_config import cfg

    os.makedirs(lock_path, exist_ok=True)
    tempfile.tempdir = lock_path  # of os-brick's ceph.conf, which has a key
    cfg.CONF([], project="basefs", default_config_files=[], default_config_dirs=[])
    lockutils.set_defaults(lock_path)
    os_brick.setup(cfg.CONF)
    # We are root and live for seconds: a privsep daemon would be one more process to end.
    for context in (privileged.default, privileged.brick_privsep_hide_output):
        context.set_client_mode(False)


def _answer(request: dict[str, Any], connection_fd: int | None) -> tuple[dict[str, Any], list[int]]:
    """The answer, and the fds that go with it."""
    try:
        if request["do"] == "properties":
            return {"properties": _properties(request)}, []
        assert connection_fd is not None
        connection_info, device_info = read_connection(connection_fd)
        connector = _connector(connection_info, is_multipath=request["multipath"])
        if request["do"] == "connect":
            return _connect(connector, connection_info)
        assert request["do"] == "disconnect"
        return _disconnect(connector, connection_info, device_info, may_be_shared=request["may_be_shared"]), []
    except _RefusedError as exc:
        return {"refused": str(exc)}, []
    except Exception as exc:  # noqa: BLE001  whatever os-brick and its commands raise is the answer
        text = str(exc).partition("Traceback (")[0]  # os-brick's own exceptions may hold one
        return {"error": f"{type(exc).__name__}: {safe_text(text)}"}, []


def _properties(request: dict[str, Any]) -> dict[str, Any]:
    from os_brick.initiator import connector

    multipath = request["multipath"]
    found: dict[str, Any] = connector.get_connector_properties(
        "", _own_address(request["towards"]), multipath, enforce_multipath=multipath, host=request["host"]
    )
    return found


def _own_address(towards: str) -> str:
    """Our IP address on the way to a host of that name; no packet is sent."""
    try:
        family, kind, _protocol, _name, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _connector(connection_info: dict[str, Any], *, is_multipath: bool) -> "InitiatorConnector":
    from os_brick.initiator.connector import InitiatorConnector

    kind = connection_info["driver_volume_type"]
    return InitiatorConnector.factory(kind, "", use_multipath=is_multipath, conn=connection_info)


def _connect(connector: "InitiatorConnector", connection_info: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    device_info = connector.connect_volume(connection_info)
    try:
        path = device_info["path"]
        if hasattr(path, "read"):
            return _served(path)
        fd = _opened(os.fsdecode(path), connection_info)
    except BaseException:
        connector.disconnect_volume(connection_info, device_info)
        raise
    return {"device": os.fsdecode(path), "device_info": {**device_info, "path": os.fsdecode(path)}}, [fd]


def _served(volume: Any) -> tuple[dict[str, Any], list[int]]:  # noqa: ANN401  os-brick has no types
    """The volume is open in this process from here, until it ends."""
    conf = getattr(volume, "rbd_conf", None)
    if conf:
        # It has the key of the cluster, and librados has read it.
        os.unlink(conf)
    streams, size = serve(volume)
    _kept.append(volume)
    return {"device": None, "device_info": None, "size": size}, [stream.detach() for stream in streams]


_kept: list[Any] = []
"""What would close its volume when it is collected."""


def _opened(path: str, connection_info: dict[str, Any]) -> int:
    # Whatever Cinder says of the access mode: it says "rw" of attachments in mode "ro", too.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    mode, kind = os.fstat(fd).st_mode, connection_info.get("format")
    if stat.S_ISREG(mode) and kind != "raw":
        os.close(fd)
        raise _RefusedError(f"the volume is a file of the format {kind}, not raw")
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(fd)
        raise _RefusedError(f"{path} is neither a block device nor a file")
    return fd


def _disconnect(
    connector: "InitiatorConnector",
    connection_info: dict[str, Any],
    device_info: dict[str, Any] | None,
    *,
    may_be_shared: bool,
) -> dict[str, Any]:
    """`may_be_shared`: the volume has attachments that are not ours, so the device may be somebody else's, too."""
    # Without a device librbd has it open, in a process that has ended.
    is_served = connection_info["driver_volume_type"] == "rbd" and not (device_info or {}).get("path")
    if is_served or connection_info["driver_volume_type"] in NO_DISCONNECT:
        return {"disconnected": True}
    users = _users_of((device_info or {}).get("path"))
    for _try in range(USERS_LOOKS):
        # An fd that was given back a moment ago may be on its way to the keeper still.
        if not users:
            break
        time.sleep(USERS_LOOK_PAUSE_S)
        users = _users_of((device_info or {}).get("path"))
    if users and may_be_shared:
        return {"disconnected": False, "users": users}
    if users:
        raise errors.VolumeError(f"the device is still open by {', '.join(users)}")
    connector.disconnect_volume(connection_info, device_info)
    return {"disconnected": True}


def _users_of(path: str | None) -> list[str]:
    """Who has the device open, or what of the kernel lies on it: os-brick would take it away from under them."""
    if not path:
        return []
    real = os.path.realpath(path)
    found = [f"the device {name}" for name in _names_in(f"/sys/class/block/{os.path.basename(real)}/holders")]
    for pid in filter(str.isdecimal, _names_in("/proc")):
        for name in _names_in(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{name}") == real:
                    found.append(f"process {pid}")
                    break
            except OSError:
                continue
    return found


def _names_in(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


if __name__ == "__main__":
    main()

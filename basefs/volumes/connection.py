"""What is known of a connection to a volume, kept as a sealed memfd: a secret that is in no file, argument or log."""

import fcntl
import json
import os
from collections.abc import Mapping
from typing import Any

from basefs import errors

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_BYTES_MAX = 1 << 20


def sealed_connection(connection_info: Mapping[str, Any], device_info: Mapping[str, Any] | None = None) -> int:
    """A sealed memfd, the caller's, of Cinder's `connection_info` and os-brick's `device_info` (None: none yet)."""
    content = {"connection_info": dict(connection_info), "device_info": device_info and dict(device_info)}
    fd = os.memfd_create("basefs-connection", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.pwrite(fd, json.dumps(content).encode(), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_connection(fd: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`connection_info` and `device_info` of a memfd that `sealed_connection` made. Its offset is not used.

    Raises:
        VolumeError: it is no such memfd.
    """
    try:
        content = json.loads(os.pread(fd, _BYTES_MAX, 0))
        connection_info, device_info = content["connection_info"], content["device_info"]
    except (OSError, ValueError, TypeError, LookupError):
        raise errors.VolumeError("what was kept of the connection cannot be read") from None  # nothing of it is shown
    if not isinstance(connection_info, dict) or not isinstance(device_info, dict | None):
        raise errors.VolumeError("what was kept of the connection cannot be read")
    return connection_info, device_info

"""systemd as a service sees it: notifications, and the fds that it keeps for us. Standard library only.

What systemd 252 does with the fd store was tried on a real one (docs/DESIGN.md, section 1): it gives the fds back to
the next main process after a crash and after `systemctl restart`, in any order, and keeps them meanwhile; it closes
them once the unit is inactive or failed and no job is queued for it, also while a process of it still runs.
"""

import contextlib
import os
import socket
from collections.abc import Sequence

FIRST_FD = 3
SEND_LIMIT_S = 2.0
"""A service manager that does not read must not hold up a keeper."""


def tell_systemd(state: str, fds: Sequence[int] = ()) -> bool:
    """Send a notification to the service manager; whether there is one that took it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(SEND_LIMIT_S)
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            if fds:
                socket.send_fds(sender, [state.encode()], list(fds))
            else:
                sender.send(state.encode())
    except OSError:
        return False
    return True


def inherited_fds() -> list[tuple[str, int]]:
    """The fds that systemd passed to this process, with their names; ours, closed at exec and told once only."""
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for fd, name in zip(range(FIRST_FD, FIRST_FD + int(count)), names.split(":"), strict=False):
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)
            found.append((name, fd))
    return found


def close_all(fds: Sequence[int]) -> None:
    """Close them; one that is not open is none of our business."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)

"""What a keeper is started with, by `basefs mount` as by tests. Standard library only.

No dataclasses in what a keeper imports: they bring `inspect`, 1.1 MiB of its 15.
"""

import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

from basefs.processes import KEEPER_MODULE

REQUEST_SOCKET_SUFFIX = ".keeper"


class KeeperSpec(NamedTuple):
    """What a keeper is started with. Paths are absolute and resolved; `ready_fd` is the pipe of `--background`."""

    mountpoint: str
    cache_dir: str
    config_files: list[str]
    config_dirs: list[str]
    view: str = "raw"
    control_socket: str = ""
    """The server's; ours is beside it. None is made where this is empty."""
    read_ahead_kib: int = 1024
    max_background: int = 8192
    start_deadline_s: float = 60.0
    watchdog_s: float = 20.0
    upgrade_deadline_s: float = 30.0
    ready_fd: int | None = None
    server_command: Sequence[str] = (sys.executable, "-P", "-m", "basefs.service")


def command_line(spec: KeeperSpec) -> list[str]:
    """The program to run, or to become, for a keeper of that spec."""
    return [sys.executable, "-P", "-m", KEEPER_MODULE, json.dumps(spec._asdict())]


def request_socket_of(control_socket: str) -> str:
    """The path of the keeper's own socket, beside the server's; empty where the server's is."""
    return control_socket and control_socket + REQUEST_SOCKET_SUFFIX

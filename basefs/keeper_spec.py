"""What a keeper is started with, by `basefs mount` as by tests. Standard library only."""

import json
import sys
from dataclasses import asdict, dataclass, field

from basefs.processes import KEEPER_MODULE


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperSpec:
    """What a keeper is started with. Paths are absolute and resolved; `ready_fd` is the pipe of `--background`."""

    mountpoint: str
    cache_dir: str
    config_files: list[str]
    config_dirs: list[str]
    read_ahead_kib: int = 1024
    max_background: int = 1024
    start_deadline_s: float = 60.0
    ready_fd: int | None = None
    server_command: list[str] = field(default_factory=lambda: [sys.executable, "-P", "-m", "basefs.service"])


def command_line(spec: KeeperSpec) -> list[str]:
    """The program to run, or to become, for a keeper of that spec."""
    return [sys.executable, "-P", "-m", KEEPER_MODULE, json.dumps(asdict(spec))]

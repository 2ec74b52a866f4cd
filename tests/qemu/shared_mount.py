"""Mounts for tests with real guests: one for a whole folder, and who serves it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tools.mount import BasefsMount
from tools.rig import Rig

LEVELS_NOT_EXPECTED = re.compile(r" (WARNING|ERROR|CRITICAL) basefs")


@contextmanager
def shared_mount(directory: Path, rig: Rig, options: Mapping[str, object] | None = None) -> Iterator[BasefsMount]:
    """A mount over the Glance of `rig`; it must unmount cleanly and have had nothing to complain about."""
    mount = BasefsMount(directory, rig.conf_lines(), options)
    mount.start()
    try:
        yield mount
    finally:
        mount.stop()
    complaints = [line for line in mount.log_text.splitlines() if LEVELS_NOT_EXPECTED.search(line)]
    assert complaints == []


def server_pid(mount: BasefsMount) -> int:
    """The process that answers the kernel: the keeper's child."""
    argv = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in mount.pids()}
    (keeper,) = (pid for pid, arguments in argv.items() if b"basefs.keeper" in arguments)
    (server,) = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    return int(server)

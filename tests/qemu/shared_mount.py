"""Mounts for tests with real guests: one for a whole folder, and who serves it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from basefs.keeper_setup import lock_holder
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
    """The process that answers the kernel, not the standby beside it: as the lock file tells."""
    holder = lock_holder(mount.cache_dir)
    assert holder is not None
    return int(holder["server_pid"])

"""One mount for a whole folder of tests, taken away and looked at once."""

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

"""Which images the lower directory has under their names: files of nova's own, which win over ours."""

import os

from basefs.catalog.records import ImageEntry
from basefs.concurrency.threads import BlockingCalls


class LowerNames:
    """Asks the directory behind `lower_fd`. Makes nothing of an image that is complete."""

    def __init__(self, lower_fd: int) -> None:
        self._lower_fd = lower_fd
        self._threads = BlockingCalls("lower names", threads_max=1)

    async def is_lower(self, entry: ImageEntry) -> bool:
        """See `Graduation`. A directory that does not answer has it: what is unknown is left alone."""
        return await self._threads.run(_exists, self._lower_fd, entry.base_name)

    async def graduate(self, entry: ImageEntry) -> None:
        """See `Graduation`: the image stays what it is."""


def _exists(directory: int, name: str) -> bool:
    """In a thread."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return True

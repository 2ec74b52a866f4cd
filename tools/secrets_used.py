"""The passwords and tokens that tests and tools give to basefs: the suite looks for them in all that basefs says."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

RIG_PASSWORD = "Zq7-rig-hunter2"
"""Of every user of a rig. It guards a throw-away Keystone on loopback, nothing else."""
FAKE_PASSWORD = "Zq7-fake-hunter2"
FAKE_TOKEN_PREFIX = "Zq7-token-"
_KNOWN = b"|".join(re.escape(text.encode()) for text in (RIG_PASSWORD, FAKE_PASSWORD, FAKE_TOKEN_PREFIX))
SECRET = re.compile(_KNOWN + rb"|gAAAAA[\w-]{60}")
"""Those, and the Fernet tokens that a real Keystone issues."""
SAID_LOG = "said.log"
"""What commands wrote, and what the kernel tells of the processes; see `BasefsMount`."""


def secrets_in(paths: Iterable[Path]) -> Iterator[str]:
    """One text, file, line and what it says, for each line that holds a secret."""
    for path in paths:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if SECRET.search(line):
                yield f"{path}:{number}: {line[:200]!r}"


def said_files(directory: Path) -> list[Path]:
    """The logs of basefs below a directory, rotated ones too, and what its commands and processes said."""
    found = [*directory.rglob("basefs.log*"), *directory.rglob(SAID_LOG)]
    return [path for path in found if path.is_file() and not path.is_symlink()]

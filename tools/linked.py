"""Linked images as a test, a benchmark or the demo sees them: by the file's extended attributes."""

import os
import time
from pathlib import Path

LIMIT_S = 120.0


def state_of(path: Path) -> str:
    """Return the image's state, as `basefs image show` has it."""
    return os.getxattr(path, "user.basefs.state").decode()


def wait_for_state(path: Path, *states: str, limit_s: float = LIMIT_S) -> float:
    """Return the seconds until the image was in one of these states; TimeoutError after `limit_s`."""
    begun = time.monotonic()
    while (state := state_of(path)) not in states:
        if time.monotonic() - begun > limit_s:
            raise TimeoutError(f"{path.name} is {state}, not {' or '.join(states)}, after {limit_s:.0f} s")
        time.sleep(0.005)
    return time.monotonic() - begun


def volume_of(path: Path) -> str:
    """Return the image's volume; what it is read from may be a clone of it."""
    return os.getxattr(path, "user.basefs.volume_id").decode()


def linking_options(host: str, *, detach_idle_s: float = 300.0) -> dict[str, object]:
    """Return the options of a mount that links what it can, under this host's name."""
    return {
        # Glance attaches a volume for each range it reads: 0.3 s alone, 25 s beside five others on two cores.
        "lookup_deadline_s": 60,
        "other_io_deadline_s": 60,
        "template_image_handler": "auto",
        "volume_linking.host": host,
        "volume_linking.detach_idle_s": detach_idle_s,
    }

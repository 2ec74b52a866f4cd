"""The guest's disk as most images in Glance are: a qcow2 with compressed clusters. Beside the raw one, made once."""

import fcntl
import subprocess
from pathlib import Path

from tools.guest.build import Guest


def packed(guest: Guest) -> Path:
    """The compressed qcow2 of the guest's disk, made now (about a minute) if it is not there.

    Safe to call from several processes.
    """
    path = guest.disk.with_suffix(".qcow2")
    with open(path.with_suffix(".lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = path.with_suffix(".part")
            convert = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(guest.disk), str(part)]
            subprocess.run(convert, check=True, capture_output=True)
            part.rename(path)
    return path

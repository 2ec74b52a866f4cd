"""leftovers.py DIRECTORY LIFELINE_FD: what Cinder's volumes leave in the kernel is gone when the rig's starter is.

Loop devices and mounts outlive every process; a starter that is killed cannot take them away itself.
"""

import json
import os
import subprocess
import sys
import time

_SETTLE_S = 0.5  # a cinder-volume that dies with us may be inside a losetup


def mounts_below(directory: str) -> list[str]:
    """Return the mount points below a directory, the latest mount first."""
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        points = [line.split()[4].replace("\\040", " ") for line in mounts]
    return [point for point in reversed(points) if point.startswith(directory + "/")]


def loop_devices_below(directory: str) -> list[str]:
    """Return the loop devices whose file is below a directory, or was and is deleted."""
    listed = subprocess.run(
        ["losetup", "--json", "--list", "-O", "NAME,BACK-FILE"], check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(listed)["loopdevices"] if listed.strip() else []
    return [one["name"] for one in found if (one["back-file"] or "").startswith(directory + "/")]


def release(directory: str) -> None:
    """Detach every loop device and unmount every mount below the directory; one that is in use goes with its user."""
    for device in loop_devices_below(directory):
        subprocess.run(["losetup", "-d", device], check=False, stderr=subprocess.DEVNULL)
    for point in mounts_below(directory):
        subprocess.run(["umount", "-l", point], check=False, stderr=subprocess.DEVNULL)


def main() -> None:
    directory, lifeline_fd = sys.argv[1], int(sys.argv[2])
    os.read(lifeline_fd, 1)
    release(directory)
    time.sleep(_SETTLE_S)
    release(directory)


if __name__ == "__main__":
    main()

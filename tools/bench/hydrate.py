"""An image that nobody reads is hydrated, and a cold one read from end to end, beside one plain curl of it.

In alternating rounds, from the same Glance.
"""

import os
import statistics
import subprocess
import time
from pathlib import Path

from tools.bench.report import Report
from tools.mount import BasefsMount
from tools.rig import Rig

IMAGE_BYTES = 1 << 30
ROUNDS = 5
LIMIT_S = 300.0
LOOK_EVERY_S = 0.02
OPTIONS = {"hydrate_concurrency_max": 2, "hydrate_max_bytes_s": 0, "hydrate_delay_s": 0, "graduate": False}


def wait_for(path: Path, attribute: str, value: str) -> None:
    """Return when the image's extended attribute has this value: one small request a look."""
    deadline = time.monotonic() + LIMIT_S
    while os.getxattr(path, f"user.basefs.{attribute}").decode() != value:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{attribute} was not {value!r} within {LIMIT_S:g} s")
        time.sleep(LOOK_EVERY_S)


def hydrate(mount: BasefsMount, image_id: str) -> tuple[float, float]:
    """Return bytes a second from nova's pre-cache call to the last byte, and seconds until they were hashed, too."""
    path = mount.path(image_id)
    path.stat()
    here = mount.image(image_id)["cached_bytes"]  # the header, which the checks have read
    begun = time.monotonic()
    os.utime(path)
    wait_for(path, "cached_bytes", str(IMAGE_BYTES))
    complete = time.monotonic()
    wait_for(path, "state", "verified")
    hashed = time.monotonic()
    mount.cli("image", "evict", image_id)
    return (IMAGE_BYTES - here) / (complete - begun), hashed - complete


def read_cold(mount: BasefsMount, image_id: str) -> float:
    """Return bytes a second of reading all of an image of which only the header is here, in order, 1 MiB at a time."""
    path = mount.path(image_id)
    path.stat()
    here = int(mount.image(image_id)["cached_bytes"])
    with open(path, "rb") as file:  # what the kernel has of it outlives `image evict`
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begun = time.monotonic()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"], check=True)
    seconds = time.monotonic() - begun
    mount.cli("image", "evict", image_id)
    return (IMAGE_BYTES - here) / seconds


def curl(url: str, target: Path) -> float:
    """Return bytes a second of one GET into a file on the same disk."""
    begun = time.monotonic()
    subprocess.run(["curl", "-sSf", "-o", str(target), url], check=True)
    seconds = time.monotonic() - begun
    if target.stat().st_size != IMAGE_BYTES:
        raise RuntimeError(f"curl got {target.stat().st_size} bytes")
    target.unlink()
    return IMAGE_BYTES / seconds


def run(report: Report, scratch: Path) -> None:
    """Hydrate and fetch the same image in turns."""
    report.part("hydrate", f"hydration beside curl, {IMAGE_BYTES >> 20} MiB, {ROUNDS} alternating rounds, medians")
    image = scratch / "image.raw"
    with image.open("wb") as out:
        for _ in range(IMAGE_BYTES >> 24):
            out.write(os.urandom(1 << 24))
    with Rig(scratch / "rig") as rig:
        image_id = rig.upload(image, "hydrated")
        url = f"{rig.glance_url}/v2/images/{image_id}/file"
        with BasefsMount(scratch / "mount", rig.conf_lines(), OPTIONS) as mount:
            mount.wait_for_images(1)
            ours, theirs, hashing, reading = [], [], [], []
            for number in range(ROUNDS):
                if number % 2:
                    theirs.append(curl(url, scratch / "curl"))
                bytes_s, hashed_s = hydrate(mount, image_id)
                ours.append(bytes_s)
                hashing.append(hashed_s)
                reading.append(read_cold(mount, image_id))
                if not number % 2:
                    theirs.append(curl(url, scratch / "curl"))
    report.tell("hydration, MB/s", f"{statistics.median(ours) / 1e6:,.0f}")
    report.tell("curl, MB/s", f"{statistics.median(theirs) / 1e6:,.0f}")
    report.tell("hashing after it, s", f"{statistics.median(hashing):.1f}")
    report.at_least("  median ratio", statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 0.8)
    report.tell("read from end to end, cold, MB/s", f"{statistics.median(reading) / 1e6:,.0f}")
    report.at_least("  median ratio", statistics.median(a / b for a, b in zip(reading, theirs, strict=True)), 0.8)

"""A cache that is far too small: everything is evicted all the time. First in peace, then with everything at once."""

import random
import signal
from collections.abc import Callable
from contextlib import ExitStack

from tools.bench.scale import MIB
from tools.mount import BasefsMount
from tools.rig import Rig
from tools.soak.context import SERVER_GROWTH_MIB_PER_HOUR_MAX, Soak, report_steadiness, server_sampler, status
from tools.soak.fio_readers import FioReaders
from tools.soak.killer import Killer, again, forget_pages, signal_server
from tools.soak.kills import fio_images

IMAGES = 4
IMAGE_BYTES = 192 * MIB
CACHE_BYTES_MAX = 256 * MIB
CACHE_SLACK_BYTES = 16 * MIB
"""What may be on the disk beside chunks: maps, and the state database."""
READERS = 4
WARM_UP_S = 60.0
STALL_S_MAX = 15.0
OPTIONS = {"cache_max_bytes": CACHE_BYTES_MAX, "watchdog_s": 3.0}


def run(soak: Soak) -> None:
    """The phase."""
    calm_s, upheaval_s = soak.seconds(300, 30), soak.seconds(120, 20)
    soak.report.part("churn", f"{IMAGES * IMAGE_BYTES // MIB} MiB read through a cache of {CACHE_BYTES_MAX // MIB} MiB")
    scratch = soak.directory("churn")
    with Rig(scratch / "rig") as rig:
        images = fio_images(rig, scratch, IMAGES, IMAGE_BYTES)
        with BasefsMount(scratch / "mount", rig.conf_lines(), OPTIONS) as mount:
            _calm(soak, mount, images, calm_s)
            _upheaval(soak, mount, images, upheaval_s)


def _calm(soak: Soak, mount: BasefsMount, images: list[str], seconds: float) -> None:
    paths = [mount.path(image_id) for image_id in images]
    sizes: list[int] = []

    def look() -> bool:
        sizes.append(_cache_bytes(mount))
        forget_pages(paths)
        return True

    readers = FioReaders(paths, direct=READERS, buffered=READERS, seconds=seconds)
    try:
        with server_sampler(mount) as server, again(look, least_s=1.0, most_s=1.0):
            result = readers.result()
    finally:
        readers.stop()
    warm_up_s = min(WARM_UP_S, seconds / 3)
    soak.no_errors("errors of fio readers, in peace", result.errors)
    soak.report.at_most("  longest read", result.longest_stall_s, STALL_S_MAX, "s")
    soak.report.at_most(
        "  most bytes in cache_dir", max(sizes) / MIB, (CACHE_BYTES_MAX + CACHE_SLACK_BYTES) / MIB, "MiB"
    )
    report_steadiness(soak, "server", server, warm_up_s=warm_up_s, slope_max=SERVER_GROWTH_MIB_PER_HOUR_MAX)


def _cache_bytes(mount: BasefsMount) -> int:
    return sum(path.stat().st_blocks * 512 for path in mount.cache_dir.rglob("*") if path.is_file())


def _upheaval(soak: Soak, mount: BasefsMount, images: list[str], seconds: float) -> None:
    paths = [mount.path(image_id) for image_id in images]
    rng = random.Random(3)

    def upgrade() -> bool:
        return mount.cli("upgrade", check=False).returncode == 0

    def evict() -> bool:
        """Refused: the readers have all images open."""
        return "is open" in mount.cli("image", "evict", rng.choice(images), check=False).stderr

    def unlink() -> bool:
        rng.choice(paths).unlink()
        forget_pages(paths)
        return True

    acts: dict[str, tuple[Callable[[], bool], float, float]] = {
        "kill -9": (Killer(mount), 5.0, 15.0),
        "SIGSTOP": (lambda: signal_server(mount, signal.SIGSTOP), 20.0, 40.0),
        "upgrade": (upgrade, 8.0, 20.0),
        "evict, refused": (evict, 2.0, 6.0),
        "unlink": (unlink, 1.0, 3.0),
    }
    readers = FioReaders(paths, direct=READERS, buffered=READERS, seconds=seconds)
    try:
        with ExitStack() as stack:
            running = {
                name: stack.enter_context(again(act, least_s=least_s, most_s=most_s, seed=seed))
                for seed, (name, (act, least_s, most_s)) in enumerate(acts.items())
            }
            result = readers.result()
    finally:
        readers.stop()
    soak.report.tell("done at the same time", ", ".join(f"{one.done} {name}" for name, one in running.items()))
    soak.no_errors("errors of fio readers, in the upheaval", result.errors)
    soak.report.at_most("  longest read", result.longest_stall_s, STALL_S_MAX, "s")
    soak.report.at_most("damaged chunks", status(mount)["damaged_chunks"], 0)

"""All at once: raw, qcow2 and compressed images graduate, are unlinked and evicted, while servers and readers die."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tools.bench.scale import MIB
from tools.mount import BasefsMount, reader_pids
from tools.rig import Rig
from tools.soak.context import Soak, status
from tools.soak.fio_readers import FioReaders, make_image
from tools.soak.killer import Killer, again, forget_pages, signal_server
from tools.soak.lower_writers import lower_writers

IMAGE_BYTES = 96 * MIB
FORMS: dict[str, tuple[str, ...]] = {
    "raw": (),
    "qcow2": ("-O", "qcow2"),
    "zlib": ("-O", "qcow2", "-c", "-o", "compression_type=zlib"),
    "zstd": ("-O", "qcow2", "-c", "-o", "compression_type=zstd,cluster_size=128k"),
}
"""How `qemu-img convert` makes an image of what fio wrote."""
LAYOUTS = ((160 * MIB, 1), (1000 * MIB, 0), (100 * MIB, 2))
"""`cache_max_bytes` and `readers`, one after the other: room for one image, so that something is evicted and fetched
again all the time, and for all of them, so that they graduate."""
READERS = 4
WRITERS = 2
STALL_S_MAX = 45.0
"""Glance is away for 5 s; what three unlucky kills have held back waits until a server served 10 s, or died without."""
GLANCE_AWAY_S = 5.0
OPTIONS: dict[str, object] = {
    "cache_max_bytes": 1000 * MIB,
    "watchdog_s": 3.0,
    "readers": 2,
    "graduate": True,
    "hydrate_concurrency_max": 2,
    "hydrate_delay_s": 3.0,
    "scrub_interval_s": 3600.0,
}


def run(soak: Soak) -> None:
    """The phase."""
    seconds = soak.seconds(240, 30)
    soak.report.part("storm", f"{', '.join(FORMS)} images through graduation, eviction and deaths for {seconds:.0f} s")
    scratch = soak.directory("storm")
    with Rig(scratch / "rig") as rig:
        images = _images(rig, scratch)
        with BasefsMount(scratch / "mount", rig.conf_lines(), OPTIONS) as mount:
            _storm(soak, rig, mount, list(images.values()), seconds)


def _images(rig: Rig, scratch: Path) -> dict[str, str]:
    images = {}
    for name, options in FORMS.items():
        make_image(scratch / "written", IMAGE_BYTES, compressible_percent=60)
        made = scratch / name
        if options:
            subprocess.run(["qemu-img", "convert", *options, scratch / "written", made], check=True)
        else:
            (scratch / "written").rename(made)
        images[name] = rig.upload(made, f"fio-{name}", "qcow2" if options else "raw")
        made.unlink()
    (scratch / "written").unlink(missing_ok=True)
    return images


def _acts(rig: Rig, mount: BasefsMount, images: list[str]) -> dict[str, tuple[Callable[[], bool], float, float]]:
    """What is done to the mount, by name: the act, and the least and the most seconds between two of it."""
    paths = [mount.path(image_id) for image_id in images]
    rng = random.Random(5)
    layouts = itertools.cycle(LAYOUTS)

    def reader(number: signal.Signals) -> Callable[[], bool]:
        def act() -> bool:
            pids = reader_pids(mount)
            if not pids:
                return False
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pids), number)
            return True

        return act

    def upgrade() -> bool:
        """To another number of readers, and another limit of the cache."""
        cache_bytes_max, readers = next(layouts)
        mount.configure(rig.conf_lines(), {**OPTIONS, "cache_max_bytes": cache_bytes_max, "readers": readers})
        return mount.cli("upgrade", check=False).returncode == 0

    def unlink() -> bool:
        """Of a plain file of what has graduated, too: the name is a lazy image again."""
        with contextlib.suppress(FileNotFoundError):  # killed between its two steps
            rng.choice(paths).unlink()
        forget_pages(paths)
        return True

    def command(*arguments: str) -> Callable[[], bool]:
        return lambda: mount.cli(*arguments, rng.choice(images), check=False).returncode == 0

    def glance_away() -> bool:
        rig.stop_service("glance")
        threading.Event().wait(GLANCE_AWAY_S)
        rig.start_service("glance")
        return True

    return {
        "kill -9": (Killer(mount), 5.0, 15.0),
        "SIGSTOP": (lambda: signal_server(mount, signal.SIGSTOP), 20.0, 40.0),
        "kill -9 of a reader": (reader(signal.SIGKILL), 2.0, 6.0),
        "SIGSTOP of a reader": (reader(signal.SIGSTOP), 15.0, 30.0),
        "upgrade": (upgrade, 8.0, 20.0),
        "unlink": (unlink, 2.0, 6.0),
        "verify": (command("image", "verify"), 5.0, 10.0),
        "warm": (command("image", "warm", "--no-wait"), 5.0, 10.0),
        "Glance away": (glance_away, 25.0, 50.0),
    }


@contextlib.contextmanager
def _acting(rig: Rig, mount: BasefsMount, images: list[str]) -> Iterator[Callable[[], str]]:
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(again(act, least_s=least_s, most_s=most_s, seed=seed))
            for seed, (name, (act, least_s, most_s)) in enumerate(_acts(rig, mount, images).items())
        }
        yield lambda: ", ".join(f"{one.done} {name}" for name, one in running.items())


def _storm(soak: Soak, rig: Rig, mount: BasefsMount, images: list[str], seconds: float) -> None:
    paths = [mount.path(image_id) for image_id in images]
    readers = FioReaders(paths, direct=READERS, buffered=READERS, seconds=seconds)
    try:
        with _acting(rig, mount, images) as done, lower_writers(mount.mountpoint, WRITERS) as writers:
            result = readers.result()
            acts = done()
    finally:
        readers.stop()
    report = soak.report
    report.tell("done at the same time", acts)
    soak.no_errors("errors of fio readers", result.errors)
    report.at_least("reads that fio verified", result.reads, 10 * seconds)
    report.at_most("longest read", result.longest_stall_s, STALL_S_MAX, "s")
    soak.no_errors("errors of writers of lower files", [error for writer in writers for error in writer.errors])
    now = status(mount)
    report.at_most("damaged chunks", now["damaged_chunks"], 0)
    report.at_most("images quarantined", now["images_quarantined"], 0)
    graduated = mount.log_text.count("it is a file of the lower directory now")
    report.at_least("graduations", graduated, 1)
    soak.no_errors("records of bugs", [line for line in mount.log_text.splitlines() if " bug in " in line])

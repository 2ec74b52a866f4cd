"""Images in Cinder: how soon a volume takes over from Glance, how fast it is read, what a boot asks of Glance."""

import contextlib
import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tools.bench.cached import DIRECT, IMAGE_BYTES, ROUNDS, compare, minimal_mount
from tools.bench.report import Report
from tools.guest import build
from tools.guest.boot import boot, create_overlay
from tools.linked import linking_options, volume_of, wait_for_state
from tools.mount import BasefsMount
from tools.rig import Rig
from tools.rig.cinder import Backend
from tools.rig.leftovers import loop_devices_below

MIB = 1 << 20
ATTACHES = 5
LARGE_BYTES = 20 << 30
CROWD = 50
LOOKED_AT = 150


def run(report: Report, scratch: Path) -> None:
    """Attach one by one, read a volume beside the minimal file system, boot a guest, attach fifty at once."""
    with Rig(scratch / "rig", nfs=True) as rig:
        small = scratch / "small.raw"
        small.write_bytes(os.urandom(4 * MIB))
        report.part("linked", f"from the first open to the first byte of the device, {ATTACHES} images each")
        _attach_each(report, rig, scratch, small, "loop", multiattach=True)
        _attach_each(report, rig, scratch, small, "loop", multiattach=False)
        _attach_each(report, rig, scratch, small, "nfs", multiattach=False)
        report.part("linked", f"reads of a volume in the page cache, {ROUNDS} alternating rounds, medians")
        _read(report, rig, scratch)
        report.part("linked", f"first boot of a linked image of {LARGE_BYTES >> 30} GiB, Debian 12 (TCG), cache=none")
        _boot(report, rig, scratch)
        report.part("linked", f"{CROWD} images opened at once")
        _crowd(report, rig, scratch, small)


def _mount(rig: Rig, scratch: Path, name: str) -> BasefsMount:
    return BasefsMount(scratch / name, rig.conf_lines(), linking_options(f"bench-{name}"))


def _attach_each(report: Report, rig: Rig, scratch: Path, image: Path, backend: Backend, *, multiattach: bool) -> None:
    ids = [rig.place_cinder(image, f"{backend}-{n}", multiattach=multiattach, backend=backend) for n in range(ATTACHES)]
    seconds = []
    seen = len(rig.requests("/v3/", "cinder"))
    with _mount(rig, scratch, f"{backend}-{multiattach}") as mount:
        for image_id in ids:
            path = mount.path(image_id)
            path.stat()  # the checks, which fetch the header, are not linking's
            begun = time.monotonic()
            with open(path, "rb") as held:
                wait_for_state(path, "linked")
                os.pread(held.fileno(), 4096, 2 * MIB)
            seconds.append(time.monotonic() - begun)
        clones = _clones_s(rig, seen)
    if not multiattach:
        report.tell(f"{backend}: a clone, median", f"{statistics.median(clones):.2f} s")
        seconds = [whole - clone for whole, clone in zip(seconds, clones, strict=True)]
    report.tell(f"{backend}{'' if multiattach else ', without it'}: median", f"{statistics.median(seconds):.2f} s")
    report.at_most("  longest", max(seconds), 1.5, "s")


def _clones_s(rig: Rig, seen: int) -> list[float]:
    """How long each clone took, from the request for it to the one for its attachment."""
    posts = [one for one in rig.requests("/v3/", "cinder")[seen:] if one.method == "POST"]
    attached = [one.at for one in posts if one.path == "/v3/attachments"]  # Glance's too, while it reads
    begun = [one.at for one in posts if one.path == "/v3/volumes"]
    return [next(at for at in attached if at > begin) - begin for begin in begun]


def _read(report: Report, rig: Rig, scratch: Path) -> None:
    image = scratch / "image.raw"
    block = os.urandom(16 << 20)
    with open(image, "wb") as out:
        out.writelines(block for _ in range(IMAGE_BYTES // len(block)))
    image_id = rig.place_cinder(image, "read")
    with _mount(rig, scratch, "read") as mount:
        mine = mount.path(image_id)
        with open(mine, "rb") as held:
            wait_for_state(mine, "linked")
            (device,) = loop_devices_below(rig.directory)
            with minimal_mount(Path(device), scratch / "minimal") as other, open(other, "rb") as theirs:
                while piece := held.read(16 << 20):
                    assert theirs.read(len(piece)) == piece
                for workload in DIRECT:
                    compare(report, workload, mine, other)


def _boot(report: Report, rig: Rig, scratch: Path) -> None:
    guest = build()
    image_id = rig.place_cinder(guest.disk, "debian12", size=LARGE_BYTES)
    with _mount(rig, scratch, "boot") as mount:
        base = mount.path(image_id)
        with open(base, "rb"):
            wait_for_state(base, "linked")
        create_overlay(base, scratch / "overlay")
        booted = boot(scratch / "overlay", guest)
        report.tell("multi-user.target", f"{booted.ready_s:.1f} s")
        sent = sum(one.length for one in rig.requests(f"{image_id}/file") if one.method == "GET")
        report.at_most("image bytes that Glance sent, the header", sent, MIB, "bytes")


def _crowd(report: Report, rig: Rig, scratch: Path, image: Path) -> None:
    ids = [rig.place_cinder(image, f"crowd-{n}") for n in range(CROWD)]
    others = rig.clone(rig.upload(b"looked at", "others"), LOOKED_AT)
    with _mount(rig, scratch, "crowd") as mount:
        paths = [mount.path(image_id) for image_id in ids]
        for path in (*paths, *(mount.path(image_id) for image_id in others)):
            path.stat()
        with _looking([mount.path(image_id) for image_id in others]) as looks:
            begun = time.monotonic()
            fds = [os.open(path, os.O_RDONLY) for path in paths]
            for path in paths:
                wait_for_state(path, "linked")
            seconds = time.monotonic() - begun
        assert len({volume_of(path) for path in paths}) == CROWD
        for fd in fds:
            os.close(fd)
    report.tell("all linked after", f"{seconds:.1f} s")
    report.tell("stat meanwhile: median", f"{statistics.median(looks) * 1000:.2f} ms of {len(looks)}")
    report.at_most("  longest", max(looks) * 1000, 10, "ms")


@contextlib.contextmanager
def _looking(paths: list[Path]) -> Iterator[list[float]]:
    """How long each stat took; each file again only when the kernel has forgotten its attributes (1 s)."""
    looks: list[float] = []
    is_over = threading.Event()

    def look() -> None:
        for path in itertools.cycle(paths):
            if is_over.wait(0.01):
                return
            begun = time.monotonic()
            path.stat()
            looks.append(time.monotonic() - begun)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield looks
    finally:
        is_over.set()
        looking.join()

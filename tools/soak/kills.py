"""kill -9 of the server every 1 to 3 s: under 16 verifying fio readers, under writers, and while a real guest boots."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tools.bench.scale import MIB
from tools.guest import BootError, BootResult, Guest, boot, build, create_overlay
from tools.mount import BasefsMount
from tools.rig import Rig
from tools.soak.context import (
    KEEPER_GROWTH_MIB_PER_HOUR_MAX,
    KEEPER_MIB_MAX,
    Soak,
    end_children,
    keeper_sampler,
    report_steadiness,
)
from tools.soak.fio_readers import FioReaders, make_image
from tools.soak.killer import Killer, again, forget_pages
from tools.soak.lower_writers import lower_writers
from tools.soak.samples import Sampler

IMAGES = 4
IMAGE_BYTES = 256 * MIB
READERS = 8
WRITERS = 4
STALL_S_MAX = 10.0
"""A restart, and the reads of 16 readers that wait for it, on two cores that also run fio and qemu."""
BOOT_LIMIT_S = 600.0
WARM_UP_S = 15.0


def run(soak: Soak) -> None:
    """The phase."""
    seconds = soak.seconds(60, 15)
    soak.report.part("kills", f"kill -9 of the server every 1-3 s for {seconds:.0f} s and until a guest has booted")
    scratch = soak.directory("kills")
    guest = build()
    with Rig(scratch / "rig") as rig:
        images = fio_images(rig, scratch, IMAGES, IMAGE_BYTES)
        guest_image = rig.place(guest.disk, "debian12")
        with BasefsMount(scratch / "mount", rig.conf_lines()) as mount, keeper_sampler(mount) as keeper:
            paths = [mount.path(image_id) for image_id in images]
            overlay = scratch / "overlay"
            create_overlay(mount.path(guest_image), overlay)
            _kill(soak, mount, paths, overlay, guest, seconds)
            _report_keeper(soak, keeper)


def fio_images(rig: Rig, scratch: Path, count: int, size: int) -> list[str]:
    """Images that fio can verify, in Glance."""
    images = []
    for number in range(count):
        make_image(scratch / "image", size)
        images.append(rig.upload(scratch / "image", f"fio-{number}"))
    (scratch / "image").unlink()
    return images


def _kill(soak: Soak, mount: BasefsMount, paths: list[Path], overlay: Path, guest: Guest, seconds: float) -> None:
    killer = Killer(mount)

    def kill() -> bool:
        is_killed = killer()
        forget_pages(paths)
        return is_killed

    readers = FioReaders(paths, direct=READERS, buffered=READERS, seconds=seconds)
    try:
        with ThreadPoolExecutor(1) as pool, again(kill, least_s=1.0, most_s=3.0) as killing:
            booting = pool.submit(boot, overlay, guest, check=True, timeout_s=BOOT_LIMIT_S)
            try:
                with lower_writers(mount.mountpoint, WRITERS) as writers:
                    result = readers.result()
                soak.report.note(f"fio has ended after {killing.done} kills; the guest boots on")
                _report_guest(soak, booting, guest)
            except BaseException:
                end_children("qemu-system")
                raise
    finally:
        readers.stop()
    report = soak.report
    report.tell("kills", killing.done)
    soak.no_errors("errors of fio readers", result.errors)
    report.at_least("reads that fio verified", result.reads, 10 * seconds)
    report.at_most("longest read of a fio reader", result.longest_stall_s, STALL_S_MAX, "s")
    soak.no_errors("errors of writers of lower files", [error for writer in writers for error in writer.errors])
    report.at_least("writes to lower files, read back", sum(writer.rounds for writer in writers), 100)


def _report_guest(soak: Soak, booting: "Future[BootResult]", guest: Guest) -> None:
    try:
        result = booting.result()
    except BootError as error:
        soak.no_errors("guest that boots under kills", str(error)[-500:])
        return
    troubles = [line for line in result.console.splitlines() if "I/O error" in line or "EXT4-fs error" in line]
    if result.payload_sha256 != guest.payload_sha256:
        troubles.append(f"the guest read a payload with sha256 {result.payload_sha256}")
    soak.no_errors("guest that boots under kills", troubles)
    soak.report.tell("boot of the guest under kills", f"{result.ready_s:.0f} s")


def _report_keeper(soak: Soak, keeper: Sampler) -> None:
    slope_max = KEEPER_GROWTH_MIB_PER_HOUR_MAX
    report_steadiness(soak, "keeper", keeper, warm_up_s=WARM_UP_S, slope_max=slope_max)
    soak.report.at_most(
        "keeper: memory", max((one.rss_mib for one in keeper.samples), default=0), KEEPER_MIB_MAX, "MiB"
    )

"""200 replayed guests on 20 images, and no Glance for ten minutes while they boot."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.replay import load_trace
from tools.mount import BasefsMount
from tools.rig import Rig
from tools.soak.context import (
    Soak,
    server_sampler,
    wait_for,
)
from tools.soak.guests import Guests, GuestsResult, fairness
from tools.soak.long_forms import run_long_forms
from tools.soak.patterned import write_image

GUESTS = 200
IMAGES = 20
IMAGE_BYTES = 3 << 30
SPREAD_S = 10.0
PACE_S = 40.0
BEFORE_BYTES = 200 << 20
"""So much is here when Glance goes: a fifth of what the guests will have read."""
END_S = 300.0
RECOVERY_S_MAX = 5.0
PROBE_S_MAX = 1.0
PROBE_EVERY_S = 1.0


@dataclass(slots=True)
class Prober:
    """Measures what must not wait for Glance, while a thousand reads do."""

    mount: BasefsMount
    cached: Path
    longest_s: dict[str, float] = field(default_factory=lambda: {"stat": 0.0, "ls": 0.0, "cached read": 0.0})
    errors: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until `stop` is set."""
        while not self.stop.wait(PROBE_EVERY_S):
            try:
                self._measure("stat", lambda: os.path.lexists(self.mount.mountpoint / "no-such.part"))
                self._measure("ls", lambda: os.listdir(self.mount.mountpoint))
                self._measure("cached read", self._read)
            except OSError as error:
                self.errors.append(str(error))

    def _measure(self, name: str, act: Callable[[], object]) -> None:
        begun = time.monotonic()
        act()
        self.longest_s[name] = max(self.longest_s[name], time.monotonic() - begun)

    def _read(self) -> bytes:
        fd = os.open(self.cached, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return os.pread(fd, 4096, 0)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _probing(mount: BasefsMount, cached: Path) -> Iterator[Prober]:
    prober = Prober(mount, cached)
    thread = threading.Thread(target=prober.run)
    thread.start()
    try:
        yield prober
    finally:
        prober.stop.set()
        thread.join()


def run(soak: Soak) -> None:
    """The phase; the long forms of the tests run in the outage, when nothing else does."""
    outage_s = soak.seconds(600, 20)
    soak.report.part("outage", f"{GUESTS} replayed guests on {IMAGES} images, no Glance for {outage_s:.0f} s")
    scratch = soak.directory("outage")
    trace = load_trace()
    with Rig(scratch / "rig") as rig:
        images = []
        for number in range(IMAGES):
            write_image(scratch / "image", number, trace, IMAGE_BYTES)
            images.append(rig.place(scratch / "image", f"patterned-{number}"))
        soak.report.note(f"{IMAGES} images in Glance")
        # A read that waits ends only with Glance there or the mount gone, so whoever goes leaves in that order.
        options = {"guest_io_deadline_s": max(900.0, 1.5 * outage_s), "max_background": 4096}
        with BasefsMount(scratch / "mount", rig.conf_lines(), options) as mount:
            paths = [(mount.path(image_id), number) for number, image_id in enumerate(images)]
            for path, _ in paths:
                path.stat()
            with server_sampler(mount) as server:
                guests = Guests(
                    scratch, [paths[n % IMAGES] for n in range(GUESTS)], trace, spread_s=SPREAD_S, pace_s=PACE_S
                )
                try:
                    result, back_at = _outage(soak, rig, mount, guests, paths[0][0], outage_s)
                finally:
                    guests.stop()
            _report(soak, result, back_at)
            soak.report.tell("server: highest memory", f"{max(one.rss_mib for one in server.samples):.0f} MiB")


def _outage(
    soak: Soak, rig: Rig, mount: BasefsMount, guests: Guests, cached: Path, seconds: float
) -> tuple[GuestsResult, float]:
    """Take Glance away once a part of the reads is done, bring it back; what the guests saw, and when it was back."""
    wait_for(mount, BEFORE_BYTES)
    rig.stop_service("glance")
    try:
        soak.report.note("Glance is stopped")
        away_at = time.monotonic()
        with _probing(mount, cached) as prober:
            run_long_forms(soak, seconds)
            left_s = seconds - (time.monotonic() - away_at)
            prober.stop.wait(max(0.0, left_s))
    finally:
        rig.start_service("glance")
    back_at = time.monotonic()
    soak.report.note(f"Glance is back after {back_at - away_at:.0f} s")
    for name, longest_s in prober.longest_s.items():
        soak.report.at_most(f"longest {name} in the outage", longest_s, PROBE_S_MAX, "s")
    soak.no_errors("errors of stat, ls and cached reads", prober.errors)
    return guests.result(END_S), back_at


def _report(soak: Soak, result: GuestsResult, back_at: float) -> None:
    waits_s = result.recovery_s(back_at)
    report = soak.report
    soak.no_errors("errors of guests", result.errors)
    report.at_most("reads with a wrong byte", result.wrong, 0)
    report.tell("reads of all guests", f"{result.reads:,}")
    report.at_least("guests that waited for Glance", len(waits_s), GUESTS // 2)
    report.at_most("last guest went on after Glance was back", max(waits_s, default=0.0), RECOVERY_S_MAX, "s")
    report.tell("  first / median / last of them", fairness(waits_s))
    done_s = [ended_at - back_at for ended_at in result.ended_at]
    report.tell("boots ended after Glance was back, first / median / last", fairness(done_s))

"""Many guests boot from a few images while Glance goes away and comes back: no error, no wrong byte, nobody starves."""

import threading
import time
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.faults.conftest import HEADER_BYTES
from tests.faults.readers import eventually
from tests.semantics.conftest import status
from tools.bench.replay import load_trace
from tools.rig import Rig
from tools.soak.guests import Guests, fairness
from tools.soak.patterned import write_image

pytestmark = [pytest.mark.mount, pytest.mark.glance]

GUESTS = 40
IMAGES = 4
READS = 150
IMAGE_BYTES = 3 << 30
OUTAGE_S = 6.0
RECOVERY_S_MAX = 12.0
"""`make soak` holds it to 5 s; here other tests may have the machine."""


@pytest.mark.parametrize("kind", ["stopped", "frozen"])
def test_guests_wait_through_an_outage_and_all_of_them_go_on(
    kind: str,
    own_rig: Rig,
    basefs_mount: MountFactory,
    expected_warnings: ExpectedWarnings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = load_trace()[-READS:]
    images = []
    for number in range(IMAGES):
        write_image(tmp_path / "image", number, trace, IMAGE_BYTES)
        images.append(own_rig.place(tmp_path / "image", f"patterned-{number}"))
    mount = basefs_mount(own_rig, {"guest_io_deadline_s": 900})
    paths = [mount.path(image_id) for image_id in images]
    for path in paths:
        path.stat()
    guests = Guests(tmp_path, [(paths[n % IMAGES], n % IMAGES) for n in range(GUESTS)], trace, spread_s=1.0, pace_s=4.0)
    try:
        eventually(lambda: status(mount)["fetched_bytes"] > IMAGES * HEADER_BYTES)
        if kind == "stopped":
            expected_warnings(r"Glance is away|image \S+: GET")
            own_rig.stop_service("glance")
        else:
            expected_warnings.may_come("Glance is away: no answer")  # after 10 s
            own_rig.pause()
        threading.Event().wait(OUTAGE_S)
        assert guests.is_running
        if kind == "stopped":
            own_rig.start_service("glance")
        else:
            own_rig.resume()
        back_at = time.monotonic()
        result = guests.result(60.0)
    finally:
        own_rig.resume()
        guests.stop()
    assert (result.wrong, result.errors) == (0, ())
    assert result.reads == GUESTS * READS
    waits_s = result.recovery_s(back_at)
    with capsys.disabled():
        print(f"\n{len(waits_s)} of {GUESTS} guests waited; they went on after {fairness(waits_s)}")
    assert len(waits_s) > GUESTS / 2
    assert max(waits_s) < RECOVERY_S_MAX

"""docs/SEMANTICS.md: what happens while Glance does not answer, and when an image goes away in it."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.faults.readers import guest_program
from tests.semantics.conftest import errno_of, eventually, front_mount, opened, report, status
from tests.semantics.test_names import unknown
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

DATA = Random(4).randbytes(3_000_000)
LOOKUP_S = 1.5
OTHER_S = 2.0
GUEST_S = 60.0
RETRY_S = 10.0
PROBE_PATH = "/v2/images/00000000-0000-0000-0000-000000000000"
SLACK_S = 4.0
"""What a loaded machine may add."""
EXPECTED = ("cannot be refreshed", "Glance is away", "answered EIO", "basefs.cache.outage image")


@pytest.fixture(scope="module")
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        for n in range(15):
            running.glance.add(DATA, name=str(n))
        yield running


@pytest.fixture(scope="module")
def mount(front: MisbehavingFront, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    options = {
        "catalog_refresh_s": 0.3,
        "catalog_full_refresh_s": 0.3,
        "lookup_deadline_s": LOOKUP_S,
        "other_io_deadline_s": OTHER_S,
        "guest_io_deadline_s": GUEST_S,
    }
    with front_mount(front, tmp_path_factory.mktemp("away") / "basefs", options, EXPECTED) as mounted:
        yield mounted


@pytest.fixture
def outage(front: MisbehavingFront) -> Iterator[MisbehavingFront]:
    """Call `begin(front)` in the test; it ends with the test."""
    yield front
    front.behave()


@pytest.fixture(scope="module")
def ids(front: MisbehavingFront) -> Iterator[str]:
    return iter(list(front.glance.images))


@pytest.fixture
def image_id(ids: Iterator[str]) -> str:
    """An image no test has used."""
    return next(ids)


def begin(front: MisbehavingFront) -> None:
    front.on().respond(answers.reset())


def test_unknown_is_not_absent(outage: MisbehavingFront, mount: BasefsMount) -> None:
    """[S106] A name never seen is EIO while Glance cannot be asked, after `lookup_deadline_s` at the latest."""
    begin(outage)
    begun = time.monotonic()
    assert errno_of((mount.mountpoint / unknown("in an outage")).stat) == "EIO"
    assert time.monotonic() - begun < LOOKUP_S + SLACK_S
    assert not (mount.mountpoint / f"{unknown('in an outage')}_sm").exists()


def test_an_outage_that_was_found_out(
    outage: MisbehavingFront, mount: BasefsMount, image_id: str, tmp_path: Path
) -> None:
    """[S110] In an outage of Glance that was found out, a name never seen is EIO at once.

    [S612] In an outage that was found out, only one small request at a time goes to Glance, and readers that wait go
    on within 5 s of its return.
    """
    path = mount.path(image_id)
    path.stat()
    begin(outage)
    eventually(lambda: status(mount)["endpoints"]["glance"]["state"] == "away")
    begun = time.monotonic()
    assert errno_of((mount.mountpoint / unknown("in a known outage")).stat) == "EIO"
    assert time.monotonic() - begun < LOOKUP_S, "not after `lookup_deadline_s`"
    qemu = guest_program(tmp_path)
    argv = [str(qemu), f"if={path}", "bs=65536", "skip=30", "count=1", "status=none"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as guest:
        asked = outage.count()
        threading.Event().wait(3.0)
        assert outage.count() - asked <= 6, "probes, up to 2 s apart"
        assert {one.path for one in outage.requests()[asked + 1 :]} <= {PROBE_PATH}
        outage.behave()
        begun = time.monotonic()
        data, _ = guest.communicate(timeout=GUEST_S)
        assert time.monotonic() - begun < 5.0 + SLACK_S
    assert data == DATA[30 * 65536 : 31 * 65536]


def test_only_glances_own_word_counts(outage: MisbehavingFront, mount: BasefsMount, image_id: str) -> None:
    """[S111] An image goes only by Glance's own 404 to its id: one that lists leave out, or to which something before
    Glance answers 404, stays.
    """
    path = mount.path(image_id)
    path.stat()
    outage.on("/v2/images/").respond(answers.status(404))
    outage.on("/v2/images").respond(lambda answer: replace(answer, body=b'{"images": []}'))
    lists = outage.count("/v2/images")
    eventually(lambda: outage.count("/v2/images") >= lists + 10)
    assert path.stat().st_size == len(DATA)
    assert path.name in os.listdir(mount.mountpoint)
    assert report(mount, image_id)["status"] == "active"


def test_one_wrong_answer(outage: MisbehavingFront, mount: BasefsMount, image_id: str) -> None:
    """[S613] One wrong answer of Glance, of whatever kind, is asked about again and reaches no reader."""
    path = mount.path(image_id)
    path.stat()
    kinds = (answers.whole_for_range(), answers.status(400), answers.status(404), answers.status(500), answers.reset())
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        for number, kind in enumerate(kinds):
            rule = outage.on(f"/{image_id}/file")
            rule.respond(kind, times=1)
            offset = 1_200_128 + number * 262_144
            assert os.pread(fd, 4096, offset) == DATA[offset : offset + 4096]
    assert report(mount, image_id)["source"] == "ranged"


def test_what_is_here_is_served(outage: MisbehavingFront, mount: BasefsMount, image_id: str) -> None:
    """[S107] A name seen before resolves while Glance cannot be asked, also after a restart of basefs.

    [S608] Bytes that are here are served while Glance cannot be asked.
    """
    path = mount.path(image_id)
    assert path.read_bytes() == DATA
    begin(outage)
    assert path.read_bytes() == DATA
    mount.unmount()
    mount.start()
    assert path.stat().st_size == len(DATA)
    assert path.read_bytes() == DATA


def test_missing_bytes_are_an_error(outage: MisbehavingFront, mount: BasefsMount, image_id: str) -> None:
    """[S609] A read of bytes that are not here while Glance cannot be asked waits `other_io_deadline_s`, then fails
    with EIO.

    [S611] An error is not remembered: once Glance is back, a missing byte is asked for again, 10 s later at the latest.

    [S501] open of an image that was looked up does not wait for its bytes.
    """
    path = mount.path(image_id)
    path.stat()
    begin(outage)
    begun = time.monotonic()
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        assert time.monotonic() - begun < SLACK_S
        begun = time.monotonic()
        assert errno_of(lambda: os.pread(fd, 8192, 2_500_000)) == "EIO"
        assert OTHER_S - 0.2 < time.monotonic() - begun < OTHER_S + SLACK_S
        # The header that the checks brought is here; a read that needs more than that is not cut short.
        assert os.pread(fd, 4096, 0) == DATA[:4096]
        assert errno_of(lambda: os.pread(fd, 1 << 20, 500_000)) == "EIO"
        outage.behave()
        eventually(lambda: errno_of(lambda: os.pread(fd, 8192, 2_500_000)) is None, RETRY_S + SLACK_S)
        assert os.pread(fd, 8192, 2_500_000) == DATA[2_500_000:2_508_192]
        assert path.read_bytes() == DATA


def test_a_guest_waits(outage: MisbehavingFront, mount: BasefsMount, image_id: str, tmp_path: Path) -> None:
    """[S610] A read by a qemu system emulator waits `guest_io_deadline_s` instead, and has its bytes if Glance is back
    before.
    """
    qemu = tmp_path / "qemu-system-test"
    shutil.copyfile(shutil.which("dd") or "/bin/dd", qemu)
    qemu.chmod(0o755)
    path = mount.path(image_id)
    path.stat()
    begin(outage)
    with subprocess.Popen(
        [qemu, f"if={path}", "bs=65536", "skip=30", "count=1", "status=none"], stdout=subprocess.PIPE
    ) as guest:
        pause = threading.Event()
        pause.wait(OTHER_S + 2)  # longer than anybody else waits
        assert guest.poll() is None
        outage.behave()
        data, _ = guest.communicate(timeout=GUEST_S)
    assert data == DATA[30 * 65536 : 31 * 65536]
    assert guest.returncode == 0


def test_a_deleted_image(front: MisbehavingFront, mount: BasefsMount, ids: Iterator[str]) -> None:
    """[S109] An image that Glance has no more is ENOENT, unless all of it is here or somebody has it open.

    [S1204] When an image is deleted in Glance while it is open, its bytes that are here stay readable and the others
    answer EIO at once.
    """
    cold, header, whole, used = (next(ids) for _ in range(4))
    mount.path(header).stat()
    assert mount.path(whole).read_bytes() == DATA
    with opened(mount.path(used), os.O_RDONLY | os.O_DIRECT) as fd:
        for image_id in (cold, header, whole, used):
            front.glance.delete(image_id)
        eventually(lambda: all(report(mount, one)["status"] == "deleted" for one in (cold, header, whole, used)))
        eventually(lambda: not mount.path(header).exists())
        assert not mount.path(cold).exists()
        assert mount.path(used).stat().st_size == len(DATA)
        assert mount.path(whole).read_bytes() == DATA
        assert os.pread(fd, 100_000, 0) == DATA[:100_000]
        begun = time.monotonic()
        assert errno_of(lambda: os.pread(fd, 100_000, 2_000_000)) == "EIO"
        assert time.monotonic() - begun < OTHER_S
    eventually(lambda: not mount.path(used).exists())


def test_a_deactivated_image(front: MisbehavingFront, mount: BasefsMount, ids: Iterator[str]) -> None:
    """[S1106] An image that was deactivated in Glance while it is used here stays, with the bytes that are here.

    [S1104] An image that is not active is refused, and shown once it is active.
    """
    used, unused = next(ids), next(ids)
    with opened(mount.path(used)) as fd:
        os.pread(fd, 4096, 0)
    for image_id in (used, unused):
        front.glance.change(image_id, status="deactivated")
    eventually(lambda: report(mount, used)["status"] == report(mount, unused)["status"] == "deactivated")
    eventually(lambda: not mount.path(unused).exists())
    with opened(mount.path(used), os.O_RDONLY | os.O_DIRECT) as fd:
        assert os.pread(fd, 100_000, 0) == DATA[:100_000]
        assert errno_of(lambda: os.pread(fd, 100_000, 2_000_000)) == "EIO"
    assert "deactivated" in report(mount, unused)["refused_reason"]
    for image_id in (used, unused):
        front.glance.change(image_id, status="active")
    eventually(lambda: mount.path(unused).exists())
    assert mount.path(unused).read_bytes() == mount.path(used).read_bytes() == DATA


def test_unlink_while_a_transfer_hangs(outage: MisbehavingFront, mount: BasefsMount, image_id: str) -> None:
    """[S811] unlink, and an open after it, do not wait for a transfer that hangs in Glance."""
    path = mount.path(image_id)
    path.stat()
    outage.on("/file").respond(answers.hang(threading.Event()))
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        assert errno_of(lambda: os.pread(fd, 10, 2_500_000)) == "EIO"
    begun = time.monotonic()
    path.unlink()
    path.open("rb").close()
    assert time.monotonic() - begun < SLACK_S
    outage.behave()
    eventually(lambda: errno_of(path.read_bytes) is None)
    assert path.read_bytes() == DATA

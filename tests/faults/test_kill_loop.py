"""kill -9 of the server every 1 to 3 s while fio reads and verifies, cold and cached, with O_DIRECT and buffered."""

from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tools.rig import Rig
from tools.soak.fio_readers import FioReaders, make_image
from tools.soak.killer import KILLED_SERVERS_LOG, Killer, again, forget_pages
from tools.soak.lower_writers import lower_writers

pytestmark = [pytest.mark.mount, pytest.mark.glance]

MIB = 1 << 20
IMAGES = 3
IMAGE_BYTES = 96 * MIB
SECONDS = 15.0
STALL_S_MAX = 30.0
"""No reader's read took longer, also where eight test runs share two cores; `make soak` has the real bound."""


def test_16_verifying_readers_and_3_writers_notice_nothing_of_a_server_killed_every_1_to_3_s(
    rig: Rig,
    basefs_mount: MountFactory,
    expected_warnings: ExpectedWarnings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = []
    for number in range(IMAGES):
        make_image(tmp_path / "image", IMAGE_BYTES)
        images.append(rig.upload(tmp_path / "image", f"fio-{number}"))
    expected_warnings("|".join(KILLED_SERVERS_LOG))
    mount = basefs_mount()
    paths = [mount.path(image_id) for image_id in images]
    readers = FioReaders(paths, direct=8, buffered=8, seconds=SECONDS)

    killer = Killer(mount)

    def kill() -> bool:
        is_killed = killer()
        forget_pages(paths)
        return is_killed

    try:
        with again(kill, least_s=1.0, most_s=3.0) as killing, lower_writers(mount.mountpoint, 3) as writers:
            result = readers.result()
    finally:
        readers.stop()
    with capsys.disabled():
        print(f"\n{killing.done} kills, {result.reads:,} reads, the longest took {result.longest_stall_s:.2f} s")
    assert result.errors == ""
    assert [error for writer in writers for error in writer.errors] == []
    assert all(writer.rounds for writer in writers)
    assert killing.done >= 2
    assert len(result.stalls_s) == 16
    assert result.longest_stall_s < STALL_S_MAX

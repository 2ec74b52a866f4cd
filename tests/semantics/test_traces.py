"""docs/SEMANTICS.md, section 21: boot traces."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.semantics.conftest import IMAGE_BYTES, Image, eventually, opened
from tools.mount import BasefsMount
from tools.rig import Rig

pytestmark = pytest.mark.mount

UNIT = 65536
BOOT = [*range(38, 45), *range(18, 28)]
"""The units that a boot reads, 17 in two places beyond the header."""
BOOT_BYTES = UNIT * len(BOOT)


def boot(path: Path, content: bytes, units: list[int]) -> None:
    """Read these units of the image, and no others: without the kernel's readahead."""
    with opened(path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for unit in units:
            assert os.pread(fd, UNIT, unit * UNIT) == content[unit * UNIT : (unit + 1) * UNIT]


def trace(mount: BasefsMount, image_id: str) -> dict[str, Any]:
    """`basefs trace show`; empty where there is none."""
    done = mount.cli("trace", "show", image_id, "-f", "json", check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def units_in(shown: dict[str, Any]) -> list[int]:
    ranges = shown.get("trace", {}).get("ranges", [])
    return [unit for first, count, _, _ in ranges for unit in range(first, first + count)]


def evict(mount: BasefsMount, image_id: str) -> None:
    """Drop its bytes; refused as long as the last close is on its way."""
    eventually(lambda: mount.cli("image", "evict", image_id, check=False).returncode == 0)


def booted(image: Image) -> Image:
    """The image, not here any more, with the trace of BOOT."""
    image.path.stat()
    boot(image.path, image.content, BOOT)
    eventually(lambda: trace(image.mount, image.id))
    evict(image.mount, image.id)
    return image


def test_a_trace_is_recorded_and_replayed(image: Image) -> None:
    """[S2101] What is read of an image that is not here, from its first open on, is recorded as its boot trace, in
    order.

    [S2102] At the next open of an image that is not here the bytes of its trace are fetched without being read, and no
    others but what lies between them.
    """
    booted(image)
    assert units_in(trace(image.mount, image.id)) == BOOT
    with opened(image.path):
        eventually(lambda: image.report()["cached_bytes"] == BOOT_BYTES)
    boot(image.path, image.content, BOOT)
    assert image.report()["cached_bytes"] == BOOT_BYTES
    assert image.path.read_bytes() == image.content


def test_a_copy_leaves_no_trace(image: Image) -> None:
    """[S2103] Who reads more than half of an image leaves no trace."""
    assert image.path.read_bytes() == image.content
    evict(image.mount, image.id)
    assert trace(image.mount, image.id) == {}


def test_warming_the_boot(image: Image) -> None:
    """[S2104] `basefs image warm --boot` brings what the trace says, and no more."""
    booted(image)
    assert "is here" in image.mount.cli("image", "warm", "--boot", image.id).stdout
    assert image.report()["cached_bytes"] == BOOT_BYTES
    boot(image.path, image.content, BOOT)


def test_a_trace_is_exchanged(image: Image, new_image: Callable[[], Image], tmp_path: Path) -> None:
    """[S2105] A trace that was exported is taken by `basefs trace import` on any node with the same image, and by none
    with another; the message names what is wrong.
    """
    mount, file = image.mount, tmp_path / "trace.json"
    booted(image)
    mount.cli("trace", "export", image.id, str(file))
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "ranges": [[30, 16, 0, 0]]}))
    mount.cli("trace", "import", str(file))
    with opened(image.path):
        eventually(lambda: image.report()["cached_bytes"] == min(16 * UNIT, IMAGE_BYTES - 30 * UNIT))
    file.write_text(json.dumps({**document, "image_id": new_image().id, "os_hash_value": "00"}))
    refused = mount.cli("trace", "import", str(file), check=False)
    assert refused.returncode == 1
    assert "os_hash_value: '00', the image has" in refused.stderr
    file.write_text(json.dumps({**document, "ranges": [[9999, 1, 0, 0]]}))
    assert "ranges[0][0]: 9999" in mount.cli("trace", "import", str(file), check=False).stderr


def test_a_trace_outlives_the_bytes(
    rig: Rig, content: bytes, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    """[S2106] A trace outlives eviction and unlink of its image, graduation, and a restart of basefs.

    [S2107] A trace that is damaged or of other bytes is not used and told once; what is read is right, and the next
    boot takes its place.
    """
    image_id = rig.upload(content, "traced", "raw")
    mount = basefs_mount(options={"graduate": True, "hydrate_concurrency_max": 2, "hydrate_delay_s": 86400})
    path = mount.path(image_id)
    path.stat()
    boot(path, content, BOOT)
    eventually(lambda: trace(mount, image_id))
    path.unlink()
    with opened(path):
        assert "is in the lower directory" in mount.cli("drain").stdout
    assert units_in(trace(mount, image_id)) == BOOT
    path.unlink()
    mount.unmount()
    mount.start()
    assert units_in(trace(mount, image_id)) == BOOT

    expected_warnings("its boot trace .* is not used: byte 0: not JSON")
    path.stat()
    evict(mount, image_id)
    (mount.cache_dir / "traces" / f"{path.name}.json").write_bytes(b"damaged")
    boot(path, content, [*BOOT[:-1], 30])
    eventually(lambda: units_in(trace(mount, image_id)) == [*BOOT[:-1], 30])
    assert mount.log_text.count("is not used") == 1

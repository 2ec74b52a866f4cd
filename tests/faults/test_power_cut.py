"""A power cut at any moment: never a wrong byte (the short form of `python -m tests.faultfs.power_cut`)."""

import logging
from pathlib import Path

import pytest
import trio

from tests.faultfs.disk_image import Recording
from tests.faultfs.power_cut import CACHE, CHUNK, make_images, maps, record_use, replay, running

pytestmark = pytest.mark.mount
SAMPLES = 60


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    return make_images()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, images: dict[str, bytes]) -> Recording:
    return record_use(tmp_path_factory.mktemp("recorded"), images)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged chunks and databases are what this is about; they are counted, not logged."""
    for name in ("basefs.cache.image_fetcher", "basefs.cache.state_db"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)


def test_after_a_power_cut_at_any_moment_every_byte_of_every_image_is_right(
    recording: Recording, images: dict[str, bytes], tmp_path: Path
) -> None:
    replay(recording, images, tmp_path, count=SAMPLES, seed=1)


def test_a_cache_that_was_written_to_its_end_is_used(
    recording: Recording, images: dict[str, bytes], tmp_path: Path
) -> None:
    recording.cut(len(recording.records)).write_to(tmp_path / "all")
    cache_dir = tmp_path / "all" / CACHE
    ((path, _),) = maps(cache_dir).items()

    async def check() -> None:
        async with running(cache_dir, images, [], claims={"image-1": int(path.stem) & 0xFFFFFFFF}) as cache:
            assert await cache.read("image-1", 5, 4 * CHUNK - 5) == images["image-1"][5 : 4 * CHUNK]
            assert cache.source.requests == 0

    trio.run(check)

"""docs/SEMANTICS.md, section 6: a cache tier in front of Glance may do what it likes."""

import os
import threading
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import status
from tools.cache_tier import CacheTier
from tools.rig import Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance]


def test_a_tier_that_is_killed_under_readers_costs_no_read(
    tmp_path: Path, rig: Rig, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    """[S614] With a cache tier (`[glance] cache_endpoint`), what it does not give, or gives wrongly, comes from Glance
    in the same read.
    """
    data = os.urandom(24 << 20)
    image = rig.upload(data, "tier-killed")
    with CacheTier(tmp_path / "tier", rig.glance_url) as tier:
        mount = basefs_mount(options={"glance.cache_endpoint": tier.url, "fetch_request_bytes_max": 1 << 20})
        wrong: list[int] = []
        some_read, is_killed = threading.Semaphore(0), threading.Event()

        def read(part: int) -> None:
            with open(mount.path(image), "rb", buffering=0) as file:
                for number, offset in enumerate(range(part * (6 << 20), (part + 1) * (6 << 20), 1 << 20)):
                    if number == 2:
                        some_read.release()
                        is_killed.wait(60)
                    if os.pread(file.fileno(), 1 << 20, offset) != data[offset : offset + (1 << 20)]:
                        wrong.append(offset)

        readers = [threading.Thread(target=read, args=(part,)) for part in range(4)]
        for reader in readers:
            reader.start()
        for _ in readers:
            assert some_read.acquire(timeout=60)
        assert sum(one.sent_bytes for one in tier.served()) > 4 << 20
        assert [(one["source"], one["state"]) for one in status(mount)["stores"]] == [("cache tier", "answers")]
        tier.kill()
        is_killed.set()
        for reader in readers:
            reader.join(120)
        assert wrong == []
        assert not any(reader.is_alive() for reader in readers)
    mount.stop()
    # Who reads for longer than a second sees the tier tried again, and has it told.
    if "is not used" in mount.log_text:
        expected_warnings("the cache tier .* is not used: .*Connection refused")


def test_a_tier_with_wrong_answers_gives_no_reader_a_wrong_byte(rig: Rig, basefs_mount: MountFactory) -> None:
    """[S614] With a cache tier (`[glance] cache_endpoint`), what it does not give, or gives wrongly, comes from Glance
    in the same read.
    """
    data = os.urandom(3 << 20)
    image = rig.upload(data, "tier-wrong")
    with MisbehavingFront(upstream=rig.glance_url) as tier:
        tier.on(image).after(1).respond(answers.whole_under_206())
        mount = basefs_mount(options={"glance.cache_endpoint": tier.url})
        assert mount.path(image).read_bytes() == data
        assert tier.count(image) == 2  # its header, and what was wrong

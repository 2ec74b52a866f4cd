"""A token lives as long as Keystone says, whatever this node's clock shows."""

from datetime import timedelta

import pytest
import trio

from basefs.sources import tokens as tokens_module
from basefs.sources.glance import GlanceSource
from tests.contract.test_image_source import DATA, PIECE, SIZE, Taken
from tests.fakes import keystone as keystone_module
from tests.fakes.front import MisbehavingFront
from tests.fakes.keystone import FakeKeystone
from tests.sources.access import access_to


@pytest.fixture
def front():
    with MisbehavingFront() as running:
        yield running


async def read(source, image) -> None:
    taken = Taken()
    await source.fetch_range(image, size=SIZE, offset=0, length=PIECE, piece_bytes=PIECE, deliver=taken)
    assert taken.joined(0) == DATA[:PIECE]


class _SkewedDatetime(keystone_module.datetime):
    """Keystone's clock, hours away from ours: as if ours had jumped."""

    hours = 0.0

    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + timedelta(hours=cls.hours)


@pytest.mark.parametrize("hours", [-30.0, -6.0, 6.0, 30.0])
async def test_a_clock_that_is_hours_off_costs_no_token_and_no_read(front, tmp_path, monkeypatch, hours):
    monkeypatch.setattr(_SkewedDatetime, "hours", hours)
    monkeypatch.setattr(keystone_module, "datetime", _SkewedDatetime)
    keystone = FakeKeystone(front)
    access = access_to(tmp_path, keystone.conf_lines())
    source, image = GlanceSource(access, threads_max=2), front.glance.add(DATA)
    for _ in range(5):
        await read(source, image)
    assert len(keystone.issued) == 1
    access.close()


async def test_a_token_is_renewed_by_the_time_that_has_passed_not_by_the_clock(front, tmp_path, monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr(tokens_module, "monotonic", lambda: now_s[0])
    keystone = FakeKeystone(front, life_s=3600.0)
    access = access_to(tmp_path, keystone.conf_lines())
    source, image = GlanceSource(access, threads_max=2), front.glance.add(DATA)
    for now_s[0], issued in ((1000.0, 1), (4000.0, 1), (4580.0, 2), (8000.0, 2), (8200.0, 3)):
        await read(source, image)
        assert len(keystone.issued) == issued
    access.close()
    await trio.lowlevel.checkpoint()

"""A catalog in memory, without threads; a test that takes `autojump_clock` too needs no real time."""

import pytest

from basefs.catalog.glance_catalog import Catalog
from basefs.concurrency.outage import Outage
from tests.fakes.memory_catalog import MemoryMetadata, MemoryStore


class Lives:
    """Catalogs over one Glance and one store, one after the other."""

    def __init__(self, nursery) -> None:
        self._nursery = nursery
        self.metadata = MemoryMetadata()
        self.store = MemoryStore()
        self.outage = Outage()

    async def begin(self, **settings: float) -> Catalog:
        self.store = MemoryStore(self.store)
        values = {"refresh_s": 60.0, "full_refresh_s": 3600.0, "lookup_deadline_s": 5.0, **settings}
        catalog = Catalog(self.metadata, self.store, self._nursery, outage=self.outage, **values)
        await catalog.load()
        return catalog


@pytest.fixture
async def lives(nursery):
    """Begins catalogs; one begun after another knows what was stored."""
    return Lives(nursery)


@pytest.fixture
def metadata(lives):
    """Glance's side."""
    return lives.metadata


@pytest.fixture
def glance(metadata):
    """The images."""
    return metadata.glance

"""A mount over a Glance that misbehaves on command, shared by the tests of a file where that does them no harm."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LOG_LINE
from tests.fakes.front import MisbehavingFront
from tests.faults.readers import eventually
from tools.mount import BasefsMount, base_name

MIB = 1 << 20
HEADER_BYTES = MIB
"""What the checks fetch before a name resolves; a read from here on is the image's first ranged read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image in the front, as it is seen through the mount."""

    image_id: str
    data: bytes
    path: Path

    @property
    def file_path(self) -> str:
        """What a request for its bytes has in its path."""
        return f"/{self.image_id}/file"

    def part(self, offset: int, length: int) -> bytes:
        """The right bytes."""
        return self.data[offset : offset + length]


class Site:
    """A mount and the front it reads from; `records` are its warnings and errors since `begin`."""

    def __init__(self, front: MisbehavingFront, mount: BasefsMount, stock: list[str]) -> None:
        self.front = front
        self._stock = stock
        self.mount = mount
        self._log_from = 0
        self._allowed: list[str] = []

    def begin(self) -> None:
        """Records count from here."""
        self._log_from = len(self.mount.log_text)
        self._allowed.clear()

    def may_log(self, pattern: str) -> None:
        """A record with this (re.search) may come or not, as it depends on how fast the machine is."""
        self._allowed.append(pattern)

    def records(self) -> list[str]:
        """Warnings and errors that the mount logged since `begin`."""
        found = (LOG_LINE.match(line) for line in self.mount.log_text[self._log_from :].splitlines())
        records = [hit["record"] for hit in found if hit]
        return [record for record in records if not any(re.search(one, record) for one in self._allowed)]

    def status(self) -> dict[str, Any]:
        """What `basefs status` says, without the second that its start takes."""
        return json.loads((self.mount.mountpoint / ".basefs" / "status.json").read_text())

    def add(self, data: bytes | None = None, *, is_new: bool = False, **fields: object) -> Image:
        """An image that the mount has not looked at: 3 MiB and a bit of random bytes unless `data` says otherwise.

        Without `data`, `is_new` and `fields` it is one that the catalog knows already: a new name costs a second,
        because Glance is asked for its list at most that often.
        """
        if data is None and not is_new and not fields and self._stock:
            return self._image(self._stock.pop())
        image_data = random.Random(len(self.front.glance.images)).randbytes(3 * MIB + 1) if data is None else data
        return self._image(self.front.glance.add(image_data, **fields))

    def _image(self, image_id: str) -> Image:
        path = self.mount.mountpoint / base_name(image_id)
        return Image(image_id=image_id, data=self.front.glance.data[image_id], path=path)


@pytest.fixture
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        yield running


STOCK_IMAGES = 40
SHARED_OPTIONS = {"other_io_deadline_s": 1.0, "lookup_deadline_s": 1.5}
"""Short, so that a failure is told soon; what must succeed is tried until it does."""


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    with MisbehavingFront() as front:
        stock = [front.glance.add(random.Random(n % 4).randbytes(3 * MIB + 1)) for n in range(STOCK_IMAGES)]
        with BasefsMount(directory, front.conf_lines(), SHARED_OPTIONS) as mount:
            shared = Site(front, mount, stock)
            # Else a name's first look-up waits for the list, a second and more.
            eventually(lambda: shared.status()["images"] >= STOCK_IMAGES)
            yield shared


@pytest.fixture
def site(_shared: Site, _no_unexpected_warnings: list[str]) -> Iterator[Site]:
    """The file's mount, for one test: its log records are the test's, and the front behaves again afterwards."""
    _shared.begin()
    yield _shared
    _shared.front.behave()
    _no_unexpected_warnings.extend(_shared.records())
    assert _shared.status()["state"] == "serving", "the mount lives on"

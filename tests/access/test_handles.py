"""Any handle gives the bytes of the image whose number it holds, or an error."""

from types import SimpleNamespace
from typing import Any

import trio
from hypothesis import given
from hypothesis import strategies as st

from basefs import errors
from basefs.core.inodes import image_handle
from basefs.fuse.image_files import ImageFiles
from basefs.handlers.base import Patience

SIZE = 5000
NUMBERS = (1, 2, 3, 2**31, 2**32 - 1)
PATIENCE = Patience(deadline_s=1, is_guest=False)


class FakeImage:
    """An image whose every byte says whose it is."""

    def __init__(self, number: int) -> None:
        self.content = number.to_bytes(8, "little") * (SIZE // 8)
        self.size = len(self.content)

    def hit(self, _offset: int, _size: int) -> None:
        return None

    async def read(self, offset: int, size: int, _patience: Patience) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.content[offset : offset + size]


class FakeHandler:
    """Every image is prepared."""

    def __init__(self) -> None:
        self.images = {number: FakeImage(number) for number in NUMBERS}

    def restore_opens(self, _handles: object) -> None:
        """Nobody had anything open."""

    def opened(self, _entry: object, _image: object) -> None:
        """Not counted here."""

    async def fetch_image(self, entry: Any) -> FakeImage:
        await trio.lowlevel.checkpoint()
        return self.images[entry.number]


def image_files() -> ImageFiles:
    entries = {number: SimpleNamespace(number=number, image_id=str(number)) for number in NUMBERS}
    catalog: Any = SimpleNamespace(by_number=entries.get)
    opens: Any = SimpleNamespace(all_handles=dict, has=lambda *_, **__: False, learned=lambda *_, **__: None)
    settings: Any = SimpleNamespace(guest=PATIENCE, other=PATIENCE)
    unused: Any = None
    handler: Any = FakeHandler()
    return ImageFiles(catalog, unused, handler, settings, unused, opens, stored=unused)


ours = st.builds(
    lambda number, is_guest: image_handle(number, is_guest=is_guest), st.sampled_from(NUMBERS), st.booleans()
)
near = st.builds(lambda handle, bit: handle ^ 1 << bit, ours, st.integers(0, 63))


@given(st.lists(st.one_of(ours, near, st.integers(0, 2**64 - 1)), min_size=1, max_size=20), st.integers(0, SIZE))
def test_a_handle_reads_the_image_of_its_number_or_nothing(handles: list[int], offset: int) -> None:
    files = image_files()
    known = {image_handle(number, is_guest=is_guest): number for number in NUMBERS for is_guest in (False, True)}

    async def read_all() -> None:
        for handle in handles:
            try:
                data = await files.read(handle, offset, 4096)
            except (errors.BadHandleError, errors.NoSuchEntryError):
                assert handle not in known
            else:
                assert data == FakeImage(known[handle]).content[offset : offset + 4096]

    trio.run(read_all)

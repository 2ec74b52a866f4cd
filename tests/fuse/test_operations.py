"""Operations on their own: what a server that makes way for another one does with what it has begun."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from basefs.fuse import operations
from basefs.fuse.lower import LowerTree
from basefs.fuse.operations import Operations
from tests.fuse.test_lower_tree import ROOT, ROOT_USER, tree_over


class SlowImages:
    """Images that look for a removed name's image for ever."""

    def __init__(self) -> None:
        self.hits: dict[int, object] = {}
        self.asked = trio.Event()

    async def lower_removed(self, name: bytes) -> None:
        self.asked.set()
        await trio.sleep_forever()


def operations_over(lower: LowerTree, images: SlowImages) -> Operations:
    virtual = SimpleNamespace(owns=lambda _inode: False)
    return Operations(lower, images, virtual, SimpleNamespace())


@pytest.mark.parametrize("call", ["unlink", "rename"])
async def test_what_is_done_below_is_answered_although_the_server_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(operations, "REMOVED_LIMIT_S", 0.05)
    (tmp_path / "file").touch()
    images = SlowImages()
    answered = []
    async with tree_over(tmp_path) as lower:
        face = operations_over(lower, images)

        async def change() -> None:
            if call == "unlink":
                await face.unlink(ROOT, b"file", ROOT_USER)
            else:
                await face.rename(ROOT, b"file", ROOT, b"other", 0, ROOT_USER)
            answered.append(call)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await images.asked.wait()
            nursery.cancel_scope.cancel()
    assert answered == [call]
    assert not (tmp_path / "file").exists()

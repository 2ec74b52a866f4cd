"""A hash that goes on with what comes: of the very bytes that are there at the end, whatever became of them before."""

import hashlib
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from basefs.cache import prefix_hash
from basefs.cache.chunk_file import ChunkFile, open_chunk_file
from basefs.cache.ledger import ChunkLedger
from basefs.cache.prefix_hash import PrefixHash
from basefs.cache.verifier import ChunkVerifier
from basefs.cache.waiting_readers import WaitingReaders
from basefs.concurrency.threads import BlockingCalls
from basefs.core.chunk_map import ChunkMapHeader
from tests.cache.conftest import IMAGE_ID

CHUNK, CHUNKS = 16 * 1024, 7
SIZE = CHUNK * CHUNKS - 1000


class Hashed:
    """An image whose chunks come, go and are written over; `bytes` is what its file holds."""

    def __init__(self, directory: Path) -> None:
        file, states = open_chunk_file(directory, 42, ChunkMapHeader(image_id=IMAGE_ID, size=SIZE, chunk_bytes=CHUNK))
        self.file: ChunkFile = file
        self.ledger = ChunkLedger(states, file, size=SIZE, chunk_bytes=CHUNK)
        calls = BlockingCalls("hash", threads_max=1)
        self.damaged: list[int] = []
        self.verifier = ChunkVerifier(self.ledger, calls, calls, lambda first, _count: self.damaged.append(first))
        self.readers = WaitingReaders()
        self.hash = PrefixHash(self.ledger, self.verifier, self.readers)
        self.versions = 0

    def store(self, index: int, *, is_claimed: bool = True) -> None:
        """Other bytes than ever before, as a flight or, not claimed, as the checks store them."""
        self.versions += 1
        length = min(CHUNK, SIZE - index * CHUNK)
        self.file.write_piece(index * CHUNK, (b"%d of %d" % (self.versions, index)).ljust(length, b"."))
        self.ledger.stored(index)
        if not is_claimed:
            self.hash.drop()

    @property
    def bytes(self) -> bytes:
        return self.file.read(0, SIZE)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_hash, "HASH_BYTES", 2 * CHUNK)


steps = st.tuples(st.sampled_from(["come", "go", "written over", "hash"]), st.integers(0, CHUNKS - 1))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=30))
@example([("come", 0), ("come", 1), ("hash", 0), ("go", 0), ("come", 0)])
@example([("come", 0), ("come", 1), ("hash", 0), ("written over", 1)])
def test_the_hash_is_that_of_the_bytes_that_are_there(
    tmp_path_factory: pytest.TempPathFactory, work: list[tuple[str, int]]
) -> None:
    async def run() -> None:
        image = Hashed(tmp_path_factory.mktemp("hashed"))
        for what, index in work:
            is_here = bool(image.ledger.here(range(index, index + 1)))
            if what == "come" and not is_here:
                image.store(index)
            elif what == "go":
                image.ledger.lose(index)
            elif what == "written over" and is_here:
                image.store(index, is_claimed=False)
            elif what == "hash":
                found = await image.hash.advance("sha256")
                assert found is None or found.hexdigest() == hashlib.sha256(image.bytes).hexdigest()
        for index in image.ledger.absent(range(CHUNKS)):
            image.store(index)
        found = await image.hash.advance("sha256")
        assert found is not None
        assert found.hexdigest() == hashlib.sha256(image.bytes).hexdigest()
        image.file.close()

    trio.run(run)


@pytest.mark.parametrize("what", ["go", "written over"])
async def test_what_changes_while_it_is_hashed_counts_as_not_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    image = Hashed(tmp_path)
    for index in range(CHUNKS):
        image.store(index)
    hash_really = image.verifier.hash

    async def hash_and_change(span: range, hasher: "hashlib._Hash") -> bool:
        is_hashed = await hash_really(span, hasher)
        if 3 in span and image.versions == CHUNKS:
            if what == "go":
                image.ledger.lose(0)
            image.store(0, is_claimed=what == "go")
        return is_hashed

    monkeypatch.setattr(image.verifier, "hash", hash_and_change)
    assert await image.hash.advance("sha256") is None
    assert image.hash.losses == 1
    found = await image.hash.advance("sha256")
    assert found is not None
    assert found.hexdigest() == hashlib.sha256(image.bytes).hexdigest()
    image.file.close()


async def test_a_chunk_that_is_damaged_on_the_disk_is_found_while_it_is_hashed(tmp_path: Path) -> None:
    image = Hashed(tmp_path)
    for index in range(CHUNKS):
        image.store(index)
    with (tmp_path / "42.data").open("r+b") as data:
        data.seek(3 * CHUNK)
        data.write(b"damaged")
    assert await image.hash.advance("sha256") is None
    assert image.damaged == [3]
    assert image.ledger.absent(range(CHUNKS)) == [3]
    image.file.close()


async def test_it_goes_on_where_it_was_and_reads_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Hashed(tmp_path)
    spans: list[range] = []
    hash_really = image.verifier.hash

    async def noted(span: range, hasher: "hashlib._Hash") -> bool:
        is_hashed = await hash_really(span, hasher)
        spans.append(span)
        return is_hashed

    monkeypatch.setattr(image.verifier, "hash", noted)
    for index in (0, 1, 2, 4, 5):
        image.store(index)
    assert await image.hash.advance("sha256") is None
    assert spans == [range(2)]
    image.store(3)
    assert await image.hash.advance("sha256") is None
    image.store(6)
    with trio.CancelScope() as scope:
        scope.cancel()
        await image.hash.advance("sha256")
    assert await image.hash.advance("sha256") is not None
    assert spans == [range(2), range(2, 4), range(4, 6), range(6, 7)]
    assert image.hash.losses == 0
    image.file.close()

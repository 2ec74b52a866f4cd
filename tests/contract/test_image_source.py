"""What every `ImageSource` promises, on a Glance in memory and on a real one."""

import hashlib
import os
from dataclasses import dataclass, field

import pytest
import trio

from basefs import errors
from basefs.sources.base import Digest, ImageSource
from basefs.sources.glance import GlanceSource
from basefs.sources.tier import PROOF_BYTES, CacheTierSource
from tests.cache.memory_source import MemorySource
from tests.fakes.front import MisbehavingFront
from tests.sources.access import access_to, over_tier

DATA = os.urandom(3 * 1024 * 1024 + 12345)
SIZE = len(DATA)
PIECE = 64 * 1024
SHA512 = Digest(algorithm="sha512", value=hashlib.sha512(DATA).hexdigest())


@dataclass
class Taken:
    """A receiver that keeps what it is given, and says stop after `pieces_max` pieces."""

    pieces_max: int | None = None
    pieces: list[tuple[int, bytes]] = field(default_factory=list)

    def __call__(self, offset: int, piece: memoryview) -> bool:
        self.pieces.append((offset, bytes(piece)))
        return self.pieces_max is None or len(self.pieces) < self.pieces_max

    def joined(self, offset: int) -> bytes:
        """The bytes, after it was seen that they came in order and without gaps from `offset` on."""
        for at, piece in self.pieces:
            assert at == offset
            offset += len(piece)
        return b"".join(piece for _, piece in self.pieces)


REAL = [pytest.param(name, marks=pytest.mark.glance) for name in ("glance", "front before glance")]


@pytest.fixture(params=["memory", "front", "tier", *REAL])
def source_and_image(request, tmp_path, nursery):
    """A source, an image of DATA in it, and an id that nobody has."""
    absent = "00000000-0000-4000-8000-000000000000"
    if request.param == "memory":
        yield MemorySource({"image": DATA}), "image", absent
    elif request.param == "front":
        with MisbehavingFront() as front:
            access = access_to(tmp_path, front.conf_lines())
            yield GlanceSource(access, threads_max=8), front.glance.add(DATA), absent
            access.close()
    elif request.param == "tier":
        with MisbehavingFront() as front, MisbehavingFront(upstream=front.url) as cache:
            source, access = over_tier(tmp_path, front, cache, nursery)
            yield source, front.glance.add(DATA), absent
            source.tier.close()
            access.close()
    else:
        rig = request.getfixturevalue("rig")
        with MisbehavingFront(upstream=rig.glance_url) as front:
            access = access_to(tmp_path, rig.conf_lines() if request.param == "glance" else front.conf_lines())
            yield GlanceSource(access, threads_max=8), rig.upload(DATA, "contract"), absent
            access.close()


@pytest.fixture
def source(source_and_image) -> ImageSource:
    return source_and_image[0]


@pytest.fixture
def image(source_and_image) -> str:
    return source_and_image[1]


@pytest.fixture
def absent(source_and_image) -> str:
    return source_and_image[2]


async def test_a_probe_gives_exactly_the_header_and_says_how(source, image):
    probe = await source.probe(image, size=SIZE, header_bytes=256 * 1024)
    assert (probe.kind, probe.header) == ("ranged", DATA[: 256 * 1024])
    assert probe.reason
    proof = (1, PROOF_BYTES) if isinstance(source, CacheTierSource) else (0, 0)  # of Glance itself
    assert (source.requests - proof[0], source.received_bytes - proof[1]) == (1, 256 * 1024)


async def test_a_probe_of_a_small_image_gives_all_of_it(source, image):
    probe = await source.probe(image, size=SIZE, header_bytes=10 * SIZE)
    assert probe.header == DATA


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (0, PIECE), (0, SIZE), (1, PIECE), (PIECE, 3 * PIECE), (SIZE - 1, 1), (SIZE - 100_000, 100_000)],
)
async def test_a_range_comes_exactly_in_pieces(source, image, offset, length):
    taken = Taken()
    await source.fetch_range(image, size=SIZE, offset=offset, length=length, piece_bytes=PIECE, deliver=taken)
    assert taken.joined(offset) == DATA[offset : offset + length]
    assert {len(piece) for _, piece in taken.pieces[:-1]} <= {PIECE}
    assert len(taken.pieces) == -(-length // PIECE)
    assert (source.requests, source.received_bytes) == (1, length)


async def test_a_receiver_that_has_enough_gets_no_more(source, image):
    taken = Taken(pieces_max=2)
    await source.fetch_range(image, size=SIZE, offset=0, length=SIZE, piece_bytes=PIECE, deliver=taken)
    assert taken.joined(0) == DATA[: 2 * PIECE]
    taken = Taken(pieces_max=3)
    await source.fetch_stream(image, size=SIZE, piece_bytes=PIECE, digest=SHA512, deliver=taken)
    assert taken.joined(0) == DATA[: 3 * PIECE]
    # The connection that was given up is not used again.
    taken = Taken()
    await source.fetch_range(image, size=SIZE, offset=7, length=PIECE, piece_bytes=PIECE, deliver=taken)
    assert taken.joined(7) == DATA[7 : 7 + PIECE]


async def test_a_stream_brings_the_whole_image(source, image):
    taken = Taken()
    await source.fetch_stream(image, size=SIZE, piece_bytes=PIECE, digest=SHA512, deliver=taken)
    assert taken.joined(0) == DATA
    assert {len(piece) for _, piece in taken.pieces[:-1]} == {PIECE}
    taken = Taken()
    await source.fetch_stream(image, size=SIZE, piece_bytes=PIECE, digest=None, deliver=taken)
    assert taken.joined(0) == DATA


async def test_a_stream_with_another_hash_is_corrupt(source, image):
    for algorithm in ("sha512", "md5"):
        digest = Digest(algorithm=algorithm, value=hashlib.new(algorithm, b"else").hexdigest())
        with pytest.raises(errors.SourceCorruptError, match=algorithm):
            await source.fetch_stream(image, size=SIZE, piece_bytes=PIECE, digest=digest, deliver=Taken())


async def test_an_unknown_image_is_not_found(source, absent):
    taken = Taken()
    with pytest.raises(errors.ImageNotFoundError, match=absent):
        await source.probe(absent, size=SIZE, header_bytes=4096)
    with pytest.raises(errors.ImageNotFoundError, match=absent):
        await source.fetch_range(absent, size=SIZE, offset=0, length=1, piece_bytes=PIECE, deliver=taken)
    with pytest.raises(errors.ImageNotFoundError, match=absent):
        await source.fetch_stream(absent, size=SIZE, piece_bytes=PIECE, digest=None, deliver=taken)
    assert taken.pieces == []


async def test_many_at_once_get_each_their_own(source, image):
    spans = [(n * 70_000, 70_000) for n in range(20)]
    takers = [Taken() for _ in spans]
    async with trio.open_nursery() as nursery:
        for (offset, length), taken in zip(spans, takers, strict=True):
            nursery.start_soon(
                lambda o=offset, n=length, t=taken: source.fetch_range(
                    image, size=SIZE, offset=o, length=n, piece_bytes=PIECE, deliver=t
                )
            )
    for (offset, length), taken in zip(spans, takers, strict=True):
        assert taken.joined(offset) == DATA[offset : offset + length]
    assert (source.requests, source.received_bytes) == (20, 20 * 70_000)


async def test_a_cancelled_transfer_ends_at_the_next_piece(source, image):
    taken = Taken()
    with trio.CancelScope() as scope:

        def deliver(offset: int, piece: memoryview) -> bool:
            taken(offset, piece)
            if len(taken.pieces) == 3:
                trio.from_thread.run_sync(scope.cancel)
            return True

        await source.fetch_range(image, size=SIZE, offset=0, length=SIZE, piece_bytes=PIECE, deliver=deliver)
    assert scope.cancelled_caught
    assert taken.joined(0) == DATA[: 3 * PIECE]

"""Power cuts: what the cache wrote in a real run is replayed up to every moment, and all images are read from that.

    python -m tests.faultfs.power_cut [--samples N] [--seed N]      the long form; 0 when no byte was wrong

Needs root and /dev/fuse for the recording (a `FaultFs`); the replays are in process: state database, chunk files and
fetchers as the server uses them, over a source in memory.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from basefs import errors
from basefs.cache.fetch_services import FetchCounters
from basefs.cache.state_db import StateDatabase
from basefs.catalog.records import ImageEntry
from basefs.core.chunk_map import PAGE, parse_header
from basefs.handlers.base import Patience
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.service.inherited import _highest_number
from basefs.views.choice import Views
from tests.cache.memory_source import MemorySource
from tests.cache.records import record
from tests.cache.services import make_services
from tests.faultfs import FaultFs
from tests.faultfs.disk_image import Files, Recording
from tests.faultfs.log import records

CHUNK = 16 * 1024
CACHE = "cache"
PATIENCE = Patience(deadline_s=20, is_guest=False)


def make_images() -> dict[str, bytes]:
    """Images of one size, so that nothing but its id tells whose a chunk map is; with chunks of zeros."""
    images = {}
    for number in range(5):
        rng = random.Random(number)
        chunks = [rng.randbytes(CHUNK) if (number + index) % 4 else bytes(CHUNK) for index in range(12)]
        images[f"image-{number}"] = b"".join(chunks) + b"the end"
    return images


@dataclass(slots=True)
class Cache:
    """The cache layer of a server, over a source in memory."""

    database: StateDatabase
    handler: DownloadingTemplateImageHandler
    source: MemorySource
    entries: dict[str, ImageEntry]
    counters: FetchCounters

    async def read(self, image_id: str, offset: int, length: int) -> bytes:
        image = await self.handler.fetch_image(self.entries[image_id])
        return bytes(await image.read(offset, length, PATIENCE))


@asynccontextmanager
async def running(
    directory: Path, images: dict[str, bytes], ids: list[str], *, claims: dict[str, int] | None = None
) -> AsyncIterator[Cache]:
    """Start as a server does, know the images `ids`, and end as one that is stopped.

    With `claims` the images and their numbers are these, whatever the state database says.
    """
    chunks = directory / "chunks"
    database = await StateDatabase.open(directory / "state.sqlite", numbers_from=_highest_number(chunks))
    source, counters = MemorySource(images), FetchCounters()
    try:
        async with trio.open_nursery() as nursery:
            chunks.mkdir(parents=True, exist_ok=True)
            services = make_services(nursery, source, chunks, counters=counters, changed=database.touch)
            handler = DownloadingTemplateImageHandler(chunks, CHUNK, services, Views("raw"))
            known = {entry.image_id: entry for entry in await database.load()}
            if claims is not None:
                ids = list(claims)
                known = {image_id: _entry(image_id, claims[image_id], images) for image_id in claims}
            await handler.init()
            await handler.tidy_up({entry.number: entry for entry in known.values()})
            new = [record(image_id, size=len(images[image_id])) for image_id in ids if image_id not in known]
            numbers = await database.upsert(new, {}) if new else {}
            entries = known | {one: _entry(one, number, images) for one, number in numbers.items()}
            cache = Cache(database, handler, source, entries, counters)
            try:
                yield cache
            finally:
                with trio.CancelScope(shield=True):
                    await handler.close()
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await database.close()


def _entry(image_id: str, number: int, images: dict[str, bytes]) -> ImageEntry:
    return ImageEntry(number=number, base_name="", record=record(image_id, size=len(images[image_id])))


async def _use(directory: Path, images: dict[str, bytes]) -> None:
    """What a node does in months, in small."""
    ids = list(images)
    os.mkdir(directory)
    async with running(directory, images, ids[:3]) as cache:
        await cache.read(ids[0], 0, len(images[ids[0]]))
        await cache.database.flush()
        await cache.read(ids[1], 3 * CHUNK, 2 * CHUNK)
        await cache.handler.remove_image(cache.entries[ids[0]])
        await cache.read(ids[2], 7 * CHUNK, 5 * CHUNK + 7)
        await cache.read(ids[0], 2 * CHUNK, 10)
        await cache.database.forget(cache.entries[ids[1]].number)
    async with running(directory, images, [ids[0], ids[2], ids[3]]) as cache:
        await cache.read(ids[3], 0, len(images[ids[3]]))
        await cache.read(ids[2], 0, CHUNK)
        await cache.database.flush()
    # A state database that is lost altogether: the numbers begin anew, behind those that have files.
    forget_database(directory)
    async with running(directory, images, [ids[4], ids[3], ids[0]]) as cache:
        for image_id in (ids[4], ids[3], ids[0]):
            await cache.read(image_id, CHUNK, 6 * CHUNK)
        number = cache.entries[ids[4]].number
    # What must never be: a database that gives an image the number of another one that has a file.
    async with running(directory, images, [], claims={ids[1]: number}) as cache:
        await cache.read(ids[1], 0, 4 * CHUNK)


def record_use(directory: Path, images: dict[str, bytes]) -> Recording:
    """Use a cache on a recording disk; what it wrote."""
    log = directory / "writes.log"
    with FaultFs(backing=directory / "disk", path=directory / "mnt", log=log) as disk:
        trio.run(_use, disk.path / CACHE, images)
    return Recording(list(records(log)))


async def read_all(directory: Path, images: dict[str, bytes], rng: random.Random) -> None:
    """Start on what is in `directory`, and compare all bytes of all images with the source.

    The images come in an order of their own, so that one whose number was lost gets another's, if anything lets it.
    """
    ids = rng.sample(list(images), len(images))
    async with running(directory, images, ids) as cache:
        for image_id in ids:
            data = await cache.read(image_id, 0, len(images[image_id]))
            assert data == images[image_id], f"{image_id} has wrong bytes"


async def read_as_claimed(directory: Path, images: dict[str, bytes], rng: random.Random) -> None:
    """The same with a state database that went back: a chunk file's number is that of the image which its header
    tells, or of any other."""
    claims: dict[str, int] = {}
    for path, page in sorted(maps(directory).items()):
        image_id = rng.choice(list(images))
        with suppress(ValueError):
            if rng.random() < 0.7:
                image_id = parse_header(page).image_id
        claims[image_id] = int(path.stem) & 0xFFFFFFFF
    async with running(directory, images, [], claims=claims) as cache:
        for image_id, number in claims.items():
            data = await cache.read(image_id, 0, len(images[image_id]))
            assert data == images[image_id], f"{image_id} has wrong bytes under number {number}"


def maps(directory: Path) -> dict[Path, bytes]:
    """The headers of the chunk maps."""
    return {path: path.read_bytes()[:PAGE] for path in (directory / "chunks").glob("*.map")}


def forget_database(directory: Path) -> None:
    for name in list(directory.glob("state.sqlite*")):
        name.unlink()


def samples(recording: Recording, rng: random.Random, count: int) -> Iterator[tuple[str, Files]]:
    """`count` disks after a power cut: prefixes, torn last writes, and what a disk makes of unsynced writes."""
    length = len(recording.records)
    for at in range(count):
        where = 1 + at * length // count if at % 3 == 0 else rng.randint(1, length)
        match at % 3:
            case 0:
                yield f"cut at {where}", recording.cut(where)
            case 1:
                yield f"torn at {where}", recording.torn(where, rng)
            case _:
                yield f"scattered at {where}", recording.scattered(where, rng)


def replay(recording: Recording, images: dict[str, bytes], scratch: Path, *, count: int, seed: int) -> int:
    """Replay `count` power cuts; how many of them were told by a damaged state database.

    Raises:
        AssertionError: a byte was wrong; says where.
    """
    rng = random.Random(seed)
    damaged = 0
    for number, (what, files) in enumerate(samples(recording, rng, count)):
        for read in (read_all, read_as_claimed):
            directory = scratch / f"cut-{number}"
            files.write_to(directory)
            (directory / CACHE).mkdir(exist_ok=True)
            try:
                trio.run(read, directory / CACHE, images, rng)
            except (AssertionError, errors.BasefsError) as exc:
                raise AssertionError(f"power cut {number} ({what}), seed {seed}, {read.__name__}: {exc}") from exc
            damaged += any((directory / CACHE).glob("*.damaged-*"))
            shutil.rmtree(directory)
    return damaged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        recording = record_use(Path(directory), make_images())
        damaged = replay(recording, make_images(), Path(directory) / "cuts", count=options.samples, seed=options.seed)
        print(
            f"{options.samples} power cuts over {len(recording.records)} writes: no wrong byte; "
            f"{damaged} state databases were set aside"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

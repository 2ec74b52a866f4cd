"""From the gate to the bytes: qcow2 images that are shown as the raw disks in them."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio

from basefs import errors
from basefs.catalog.checks import View
from basefs.catalog.records import UNCHECKED, ImageEntry, Verdict
from basefs.handlers.base import Patience
from basefs.handlers.downloading import DownloadedImage, DownloadingTemplateImageHandler
from basefs.handlers.gate import ServableGate
from basefs.views.choice import Views
from tests.cache.conftest import CHUNK, IMAGE_ID, make_entry
from tests.cache.memory_source import MemorySource
from tests.cache.services import make_services
from tests.views.qcow2_files import MIB, converted_by_qemu, create, io, made, qemu

PATIENCE = Patience(deadline_s=5, is_guest=False)


class Site:
    """A gate and a handler over one image of a source; `view` is the option."""

    def __init__(
        self, gate: ServableGate, handler: DownloadingTemplateImageHandler, source: MemorySource, views: Views
    ) -> None:
        self.gate = gate
        self.handler = handler
        self.views = views
        self.source = source

    async def check(self, entry: ImageEntry) -> None:
        await self.gate.let_through(entry, deadline_s=5)

    async def image(self, entry: ImageEntry) -> DownloadedImage:
        return await self.handler.fetch_image(entry)


Sites = Callable[..., AbstractAsyncContextManager[Site]]


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    @asynccontextmanager
    async def make(data: bytes, view: View = "raw") -> AsyncIterator[Site]:
        source = MemorySource({IMAGE_ID: data})
        directory = tmp_path / "chunks"
        directory.mkdir(exist_ok=True)
        async with trio.open_nursery() as nursery:
            services = make_services(nursery, source, directory)
            views = Views(view)
            handler = DownloadingTemplateImageHandler(directory, CHUNK, services, views)
            gate = ServableGate(
                source, handler, nursery, lambda _entry: None, view=view, verify_signatures=False, header_bytes=1,
                require_verified=False, is_in_use=lambda _entry: False,
            )  # fmt: skip
            yield Site(gate, handler, source, views)
            await handler.close()
            nursery.cancel_scope.cancel()

    return make


def qcow2_entry(data: bytes) -> ImageEntry:
    return make_entry(len(data), disk_format="qcow2")


async def test_a_qcow2_image_is_let_through_with_the_size_of_its_disk_and_gives_its_bytes(sites: Sites, tmp_path: Path):
    data, disk = made(tmp_path, "partly-compressed")
    entry = qcow2_entry(data)
    async with sites(data) as site:
        await site.check(entry)
        assert (entry.verdict.state, entry.shown_size, entry.local.checked_view) == ("servable", len(disk), "raw")
        assert entry.size == len(data)
        image = await site.image(entry)
        assert image.size == len(disk)
        assert await image.read(0, MIB, PATIENCE) == disk[:MIB]
        hit = image.hit(0, 65536)
        assert hit is not None
        assert bytes(hit) == disk[:65536]
        for offset in range(0, len(disk), MIB):
            assert await image.read(offset, MIB, PATIENCE) == disk[offset : offset + MIB]


async def test_a_verdict_made_for_one_view_does_not_count_for_the_other(sites: Sites, tmp_path: Path):
    data, disk = made(tmp_path, "sparse")
    entry = qcow2_entry(data)
    async with sites(data, "stored") as site:
        await site.check(entry)
        assert (entry.shown_size, site.gate.verdict(entry).state) == (len(data), "servable")
    async with sites(data, "raw") as site:
        assert site.gate.verdict(entry) == UNCHECKED
        await site.check(entry)
        assert entry.shown_size == len(disk)
        assert await (await site.image(entry)).read(3 * MIB, 4096, PATIENCE) == b"\1" * 4096
    async with sites(data, "stored") as site:
        assert site.gate.verdict(entry) == UNCHECKED
        await site.check(entry)
        assert entry.shown_size == len(data)


async def test_what_is_refused_as_raw_may_be_shown_as_stored(sites: Sites, tmp_path: Path):
    path = tmp_path / "luks"
    secret = ("--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *secret, path, "1M")
    data = path.read_bytes()
    entry = qcow2_entry(data)
    async with sites(data, "raw") as site:
        with pytest.raises(errors.ImageRefusedError, match="encrypted"):
            await site.check(entry)
        assert entry.local.shown_size is None
    async with sites(data, "stored") as site:
        await site.check(entry)
        assert site.gate.verdict(entry).state == "servable"


async def test_an_image_in_use_whose_state_was_lost_is_checked_before_its_size_is_shown(sites: Sites, tmp_path: Path):
    data, _ = made(tmp_path, "sparse")
    entry = qcow2_entry(data)
    entry.verdict = Verdict(state="servable")
    async with sites(data) as site:
        assert not site.gate.knows_view(entry)
        assert site.gate.verdict(entry) == UNCHECKED
        image = await site.image(entry)
        assert image.hit(0, 100) is None
        with pytest.raises(errors.SourceUnavailableError, match="not checked"):
            await image.read(0, 100, PATIENCE)
        await site.check(entry)
        assert site.gate.knows_view(entry)
        assert await image.read(0, 100, PATIENCE) == bytes(100)


async def test_a_qcow2_in_a_qcow2_is_refused_for_its_backing_file_would_be_read(sites: Sites, tmp_path: Path):
    inner, path, raw = tmp_path / "inner", tmp_path / "outer", tmp_path / "raw"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", inner, "1M")
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", inner, path)
    assert converted_by_qemu(path, raw)[:4] == b"QFI\xfb"
    data = path.read_bytes()
    entry = qcow2_entry(data)
    async with sites(data) as site:
        with pytest.raises(errors.ImageRefusedError, match="the disk in it"):
            await site.check(entry)
        assert entry.verdict.state == "refused"


async def test_a_qcow2_whose_first_table_cannot_be_is_refused_with_the_byte(sites: Sites, tmp_path: Path):
    path = tmp_path / "image"
    create(path)
    io(path, "write -P 1 0 64k")
    data = bytearray(path.read_bytes())
    data[0x40000:0x40008] = (0x50200).to_bytes(8, "big")
    entry = qcow2_entry(data)
    async with sites(bytes(data)) as site:
        with pytest.raises(errors.ImageRefusedError, match="L2 entry of byte 0: a cluster at 328192"):
            await site.check(entry)


async def test_what_was_made_of_damaged_bytes_is_forgotten(sites: Sites, tmp_path: Path):
    data, disk = made(tmp_path, "full")
    entry = qcow2_entry(data)
    async with sites(data) as site:
        await site.check(entry)
        image = await site.image(entry)
        assert await image.read(0, MIB, PATIENCE) == disk[:MIB]
        assert image.hit(0, 65536) is not None
        site.views.forget(entry)
        assert image.hit(0, 65536) is None
        assert await image.read(0, MIB, PATIENCE) == disk[:MIB]
        assert image.hit(0, 65536) is not None


async def test_a_boot_trace_is_of_stored_bytes_so_it_brings_what_a_boot_from_the_disk_reads(
    sites: Sites, tmp_path: Path
) -> None:
    raw = tmp_path / "disk"
    raw.write_bytes(random.Random(5).randbytes(8 * MIB))
    qemu("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, tmp_path / "image")
    data, disk = (tmp_path / "image").read_bytes(), raw.read_bytes()
    entry = qcow2_entry(data)
    places = [(at * MIB + 5000, 256 * 1024) for at in (6, 3, 4, 7, 5)]
    async with sites(data) as site:
        await site.check(entry)

        async def boot() -> None:
            image = await site.image(entry)
            site.handler.opened(entry, image)
            await image.fetcher.trace.wait_replayed()
            for offset, length in places:
                found = image.hit(offset, length)
                if found is None:
                    found = await image.read(offset, length, PATIENCE)
                assert found == disk[offset : offset + length]
            await site.handler.released(entry)
            await image.fetcher.trace.close()

        await boot()
        await site.handler.remove_image(entry)
        site.source.calls.clear()
        image = await site.image(entry)
        site.handler.opened(entry, image)
        await image.fetcher.trace.wait_replayed()
        brought = len(site.source.calls)
        assert brought >= len(places)
        await site.handler.released(entry)
        await boot()
        assert len(site.source.calls) == brought, "tables and clusters are here"

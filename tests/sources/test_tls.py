"""Glance behind TLS: `cafile` and `insecure` decide whom we trust, and a cancelled request ends there too."""

import threading

import pytest
import trio

from basefs import errors
from basefs.sources.glance import GlanceSource
from basefs.sources.metadata import GlanceMetadata
from tests.contract.test_image_source import DATA
from tests.fakes import answers
from tests.fakes.certificate import make_certificate
from tests.fakes.front import MisbehavingFront
from tests.sources.access import access_to
from tests.sources.test_exchange import read, taken_by


@pytest.fixture
def certfile(tmp_path):
    return make_certificate(tmp_path / "server.pem")


@pytest.fixture
def front(certfile):
    with MisbehavingFront(certfile=certfile) as running:
        yield running


async def test_a_server_of_our_ca_is_trusted(front, certfile, tmp_path):
    access = access_to(tmp_path, front.conf_lines() + f"cafile = {certfile}\n")
    image = front.glance.add(DATA)
    assert await read(GlanceSource(access, threads_max=2), image) == DATA
    assert len(await GlanceMetadata(access).list_images()) == 1
    access.close()


@pytest.mark.parametrize("lines", ["", "cafile = {other}\n"])
async def test_a_server_of_another_ca_is_not_trusted(front, tmp_path, lines):
    other = make_certificate(tmp_path / "other.pem")
    access = access_to(tmp_path, front.conf_lines() + lines.format(other=other))
    with pytest.raises(errors.SourceUnavailableError, match="certificate verify failed"):
        await read(GlanceSource(access, threads_max=2), "image")
    assert front.count() == 0
    access.close()


async def test_a_cafile_that_is_not_there_is_said(front, tmp_path):
    access = access_to(tmp_path, front.conf_lines() + f"cafile = {tmp_path}/nothing.pem\n")
    with pytest.raises(errors.SourceUnavailableError, match=r"nothing\.pem"):
        await read(GlanceSource(access, threads_max=2), "image")
    access.close()


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
async def test_an_operator_may_choose_not_to_verify(front, tmp_path):
    access = access_to(tmp_path, front.conf_lines() + "insecure = true\n")
    image = front.glance.add(DATA)
    assert await read(GlanceSource(access, threads_max=2), image) == DATA
    access.close()


async def test_a_cancelled_request_ends_over_tls_too(front, certfile, tmp_path):
    access = access_to(tmp_path, front.conf_lines() + f"cafile = {certfile}\n")
    source, image = GlanceSource(access, threads_max=2), front.glance.add(DATA)
    for fault in (answers.hang(threading.Event()), answers.slow(10.0)):
        front.behave()
        front.on("/file").respond(fault)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                before = front.count("/v2/images")
                nursery.start_soon(read, source, image)
                await taken_by(front, before + 1)
                await trio.sleep(0.2)  # into the body, if there is one
                nursery.cancel_scope.cancel()
    front.behave()
    assert await read(source, image) == DATA
    access.close()

"""Attaching with os-brick's own connectors; behind a real Keystone, as the users that OPERATIONS tells of."""

import os

import pytest
import trio

from basefs import errors
from tests.contract.volume_worlds import Notes, RealWorld

pytestmark = [pytest.mark.glance, pytest.mark.cinder]
DATA = os.urandom(2_000_000)


@pytest.fixture
def world(cinder_rig, tmp_path):
    made = RealWorld(cinder_rig, tmp_path)
    yield made
    made.close()


@pytest.fixture
def service_world(cinder_keystone_rig, tmp_path):
    """As a user without the role admin: service, member and reader in the project that has Glance's volumes."""
    conf = cinder_keystone_rig.conf_lines().replace("username = basefs", "username = basefs-service")
    made = RealWorld(cinder_keystone_rig, tmp_path, conf)
    yield made
    made.close()


async def test_a_clone_on_nfs_is_a_file_that_is_read_and_goes(world, nursery):
    links, note = world.links("node-a", nursery), Notes()
    image = world.image(DATA, is_multiattach=False, backend="nfs")
    attached = await links.attach(image, await links.find(image), note)
    assert (attached.record.connector, attached.record.is_cloned) == ("nfs", True)
    assert attached.bytes.read(0, len(DATA)) == DATA
    attached.bytes.close()
    reopened = await links.reopen(image, attached.record, note)
    assert reopened.bytes.read(12345, 100_000) == DATA[12345:112_345]
    reopened.bytes.close()
    await links.detach(reopened.record, reopened.connection_fd, note)
    assert note.last is None
    os.close(attached.connection_fd)
    os.close(reopened.connection_fd)


@pytest.mark.keystone
async def test_a_service_user_reads_while_others_attach_and_detach(service_world, nursery):
    world = service_world
    links, others = world.links("node-a", nursery), world.links("node-b", nursery)
    image = world.image(DATA)
    found = await links.find(image)
    attached = await links.attach(image, found, Notes())

    async def come_and_go() -> None:
        for _ in range(2):
            other = await others.attach(image, found, Notes())
            assert other.bytes.read(0, len(DATA)) == DATA
            other.bytes.close()
            await others.detach(other.record, other.connection_fd, Notes())
            os.close(other.connection_fd)

    async with trio.open_nursery() as life:
        life.start_soon(come_and_go)
        for offset in range(0, len(DATA) - 4096, 65_537):
            assert attached.bytes.read(offset, 4096) == DATA[offset : offset + 4096]
            await trio.lowlevel.checkpoint()
    attached.bytes.close()
    await links.detach(attached.record, attached.connection_fd, Notes())
    os.close(attached.connection_fd)


@pytest.mark.keystone
async def test_a_service_user_clones_and_deletes_what_is_left(service_world, nursery):
    links, image, note = (
        service_world.links("node-a", nursery),
        service_world.image(DATA, is_multiattach=False),
        Notes(),
    )
    attached = await links.attach(image, await links.find(image), note)
    assert attached.bytes.read(0, len(DATA)) == DATA
    attached.bytes.close()
    os.close(attached.connection_fd)
    await links.remove_unknown({})
    assert service_world.clones() == []


@pytest.mark.keystone
async def test_who_may_not_see_the_volume_is_told_so(cinder_keystone_rig, tmp_path, nursery):
    conf = cinder_keystone_rig.conf_lines().replace("project_name = service", "project_name = demo1")
    world = RealWorld(cinder_keystone_rig, tmp_path, conf.replace("username = basefs", "username = u1"))
    links, image = world.links("node-a", nursery), world.image(DATA)
    with pytest.raises(errors.VolumeError):
        await links.find(image)
    world.close()

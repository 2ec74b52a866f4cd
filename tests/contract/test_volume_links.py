"""What every `VolumeLinks` promises, on a Cinder in memory and on a real one."""

import os
from dataclasses import replace

import pytest
import trio

from basefs import errors
from basefs.volumes import removing
from tests.contract.volume_worlds import MemoryWorld, Notes, RealWorld

DATA = os.urandom(1024 * 1024 + 777)


@pytest.fixture(params=["memory", pytest.param("real", marks=[pytest.mark.glance, pytest.mark.cinder])])
def world(request, tmp_path):
    is_real = request.param == "real"
    made = RealWorld(request.getfixturevalue("cinder_rig"), tmp_path) if is_real else MemoryWorld()
    yield made
    made.close()
    assert not made.attachments()
    assert not made.clones()


@pytest.fixture
def links(world, nursery):
    return world.links("node-a", nursery)


async def attached_to(links, image, note=None):
    return await links.attach(image, await links.find(image), note or Notes())


async def detach(links, attached, note=None):
    attached.bytes.close()
    await links.detach(attached.record, attached.connection_fd, note or Notes())
    os.close(attached.connection_fd)


async def test_the_volume_of_an_image_is_found_where_glance_has_it(world, links):
    found = await links.find(world.image(DATA))
    assert (found.found_by, found.is_multiattach) == ("location", True)
    assert not (await links.find(world.image(DATA, is_multiattach=False))).is_multiattach


async def test_an_image_without_a_volume_has_none(world, links):
    with pytest.raises(errors.NoVolumeError):
        await links.find(world.image_without_volume())


async def test_a_volume_that_is_too_small_is_refused(world, links):
    image = world.image(DATA)
    with pytest.raises(errors.NoVolumeError):
        await links.find(replace(image, size=(1 << 30) + 1))


@pytest.mark.parametrize("is_multiattach", [True, False])
async def test_an_attached_volume_has_the_bytes_of_the_image(world, links, is_multiattach):
    image, note = world.image(DATA, is_multiattach=is_multiattach), Notes()
    attached = await attached_to(links, image, note)
    assert attached.record.stage == "attached"
    assert note.last == attached.record
    assert attached.record.is_cloned is not is_multiattach
    assert (attached.record.attached_volume_id == attached.record.volume_id) is is_multiattach
    assert attached.bytes.size >= image.size
    assert attached.bytes.read(0, len(DATA)) == DATA
    assert attached.bytes.read(4097, 100) == DATA[4097:4197]
    target = memoryview(bytearray(5000))
    assert attached.bytes.read_now([target[:1000], target[1000:]], 12345), "just read, so in memory"
    assert target == DATA[12345:17345]
    assert not attached.bytes.read_now([target], attached.bytes.size - 10)
    with pytest.raises(OSError, match="ends"):
        attached.bytes.read(attached.bytes.size - 10, 11)
    await detach(links, attached, note)
    assert note.last is None
    assert not attached.bytes.read_now([target], 0)
    with pytest.raises(OSError, match="descriptor"):
        attached.bytes.read(0, 1)


async def test_each_step_is_noted_before_it_is_made(world, links):
    note = Notes()
    await detach(links, await attached_to(links, world.image(DATA, is_multiattach=False), note), note)
    stages = [record.stage if record else None for record in note.records]
    assert [stage for index, stage in enumerate(stages) if stage not in stages[:index]] == [
        "cloning", "reserving", "connecting", "attached", "detaching", None,
    ]  # fmt: skip


async def test_two_hosts_share_a_multiattach_volume(world, links, nursery):
    image, others = world.image(DATA), world.links("node-b", nursery)
    first, second = await attached_to(links, image), await attached_to(others, image)
    assert len(world.attachments()) == 2
    await detach(links, first)
    assert second.bytes.read(0, len(DATA)) == DATA
    await detach(others, second)


async def test_each_host_has_a_clone_of_another_one(world, links, nursery):
    image, others = world.image(DATA, is_multiattach=False), world.links("node-b", nursery)
    first, second = await attached_to(links, image), await attached_to(others, image)
    assert sorted(world.clones()) == sorted([first.record.clone_id, second.record.clone_id])
    await others.remove_unknown({image.image_id: second.record})
    assert first.bytes.read(0, len(DATA)) == DATA
    await detach(links, first)
    await detach(others, second)


async def test_a_later_server_goes_on_with_the_fds(world, links, nursery):
    attached = await attached_to(links, world.image(DATA))
    fd, connection_fd = os.dup(attached.bytes.fd_to_hold()), os.dup(attached.connection_fd)
    attached.bytes.close()
    os.close(attached.connection_fd)
    later = await world.links("node-a", nursery).adopt(attached.record, fd, connection_fd)
    assert later.bytes.read(0, len(DATA)) == DATA
    await detach(links, later)


async def test_without_the_fds_the_attachment_is_opened_anew(world, links, nursery):
    image = world.image(DATA)
    before = await attached_to(links, image)
    before.bytes.close()
    os.close(before.connection_fd)
    later = await world.links("node-a", nursery).reopen(image, before.record, Notes())
    assert later.record == before.record
    assert later.bytes.read(0, len(DATA)) == DATA
    await detach(links, later)


@pytest.mark.parametrize("is_multiattach", [True, False])
async def test_an_attachment_that_somebody_deleted_cannot_be_opened_and_leaves_nothing(world, links, is_multiattach):
    image, note = world.image(DATA, is_multiattach=is_multiattach), Notes()
    before = await attached_to(links, image)
    before.bytes.close()
    world.forget_attachment(before.record.attachment_id)
    os.close(before.connection_fd)
    with pytest.raises(errors.VolumeError):
        await links.reopen(image, before.record, note)
    assert note.last is None


async def test_detaching_needs_no_connection_and_may_be_done_again(world, links):
    attached = await attached_to(links, world.image(DATA, is_multiattach=False))
    attached.bytes.close()
    os.close(attached.connection_fd)
    for _ in range(2):
        note = Notes()
        await links.detach(attached.record, None, note)
        assert note.last is None


@pytest.mark.parametrize("is_multiattach", [True, False])
async def test_what_a_killed_server_began_is_undone_by_the_record_it_noted_last(
    world, links, nursery, monkeypatch, is_multiattach
):
    monkeypatch.setattr(removing, "LOST_AFTER_S", 0.0)
    image = world.image(DATA, is_multiattach=is_multiattach)
    found = await links.find(image)
    kills = 0
    while True:
        # It hangs at a note, before it is made; what it noted before is all that its successor knows.
        killed, note = Notes(hold_at=kills), Notes()
        async with trio.open_nursery() as life:
            life.start_soon(outcome_of, links, image, found, killed)
            await killed.is_held.wait()
            if killed.is_over:
                break
            if killed.records:
                await links.detach(killed.last, None, note)
                assert note.last is None
            assert not world.attachments()
            assert not world.clones()
            life.cancel_scope.cancel()
        kills += 1
    assert kills == (4 if is_multiattach else 6)


async def outcome_of(links, image, found, note):
    attached = await links.attach(image, found, note)
    note.hold_at = None
    await detach(links, attached, note)
    note.is_over = True
    note.is_held.set()


async def test_clones_of_this_host_that_no_record_knows_are_deleted(world, links, nursery):
    image, others = world.image(DATA, is_multiattach=False), world.links("node-b", nursery)
    lost, kept = await attached_to(links, image), await attached_to(others, image)
    lost.bytes.close()
    os.close(lost.connection_fd)
    await links.remove_unknown({})
    assert world.clones() == [kept.record.clone_id]
    await detach(others, kept)


async def test_attachments_of_this_host_that_no_record_knows_are_deleted(world, links, nursery):
    image, others = world.image(DATA), world.links("node-b", nursery)
    lost, kept = await attached_to(links, image), await attached_to(others, image)
    lost.bytes.close()
    os.close(lost.connection_fd)
    await links.remove_unknown({})
    assert world.attachments() == [kept.record.attachment_id]
    await detach(others, kept)

"""The life of a linked image: attached under readers, failing, idle, removed, and over killed servers."""

import errno
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from basefs import errors
from basefs.handlers.link_tasks import AT_HAND_AGAIN_S
from basefs.handlers.linked import HANG_S
from tests.conftest import ExpectedWarnings
from tests.handlers.linking_node import IDLE_S, World, a_linking_node, held

CONTENT = bytes(range(256)) * 32_000 + b"the end"
MIB = 1 << 20


@pytest.fixture
def world(tmp_path: Path):
    world = World(tmp_path)
    yield world
    world.escrow.close()
    for one in list(world.cinder.open_bytes):
        one.close()


async def test_opening_an_image_links_it_and_its_readers_move_over(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    gate = world.cinder.on("connect").hangs(times=1)
    async with a_linking_node(world) as node:
        await node.open(entry)
        first = await node.handler.fetch_image(entry)
        assert await node.read(entry, 0, 4096) == CONTENT[:4096]
        assert node.state(entry) in ("finding", "linking"), "open and read wait for no volume"
        await gate.reached.wait()
        gate.release()
        await node.linked(entry)
        requests = node.glance_requests()
        second = await node.handler.fetch_image(entry)
        assert second is not first
        for offset in range(0, len(CONTENT), 100_000):
            await node.read(entry, offset, 100_000)
        assert await node.read(entry, len(CONTENT) - 3, 4096) == b"end"
        assert await node.read(entry, len(CONTENT), 4096) == b""
        assert node.glance_requests() == requests, "no byte came over Glance"
        assert held(world) == {"linked/1", "link-connection/1"}
        record = node.handler.link(entry).record
        assert (record.stage, record.connector) == ("attached", "memory")
    assert world.cinder.is_clean()
    assert held(world) == set()
    assert world.noted.get(entry.number) is None


async def test_a_volume_that_cannot_be_attached_twice_is_cloned(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT, is_multiattach=False)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        (clone,) = world.cinder.clones()
        assert node.handler.link(entry).record.attached_volume_id == clone.volume_id
        await node.read(entry)
    assert world.cinder.is_clean()


@pytest.mark.parametrize("failure", ["EIO", "hang"])
async def test_a_volume_that_fails_costs_no_read_and_is_linked_again(
    world: World, clock: MockClock, failure: str, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(f"its volume .* failed.*{'no answer within' if failure == 'hang' else 'Input/output'}")
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        before = await node.handler.fetch_image(entry)
        volume = world.volume(entry)
        volume.breaks() if failure == "EIO" else volume.hangs()
        async with trio.open_nursery() as nursery:
            for n in range(40):
                nursery.start_soon(node.read, entry, n * 50_000, 50_000)
        assert node.state(entry) == "broken"
        assert before.hit(0, 10) is None, "a closed volume has nothing"
        assert "its volume failed: bytes" in node.handler.link(entry).reason
        reads = volume.reads
        assert reads <= 3 * 40 + 2
        await node.read(entry)
        assert volume.reads == reads, "nothing is read from a volume that failed"
        volume.heals()
        await node.until_state(entry, "linked")
        await node.read(entry)
        assert volume.reads > reads
        assert node.links.steps.counters.breaks == 1
    assert world.cinder.is_clean()


async def test_a_read_that_waits_behind_others_breaks_no_volume(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        source = (await node.handler.fetch_image(entry)).source
        world.volume(entry).hangs()

        async def another_is_answered() -> None:
            await trio.sleep(HANG_S - 1)
            source._answered_at = trio.current_time()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(another_is_answered)
            await node.read(entry, 0, 10)
        assert node.state(entry) == "linked"
        world.volume(entry).heals()


async def test_a_reader_waits_for_a_volume_no_longer_than_half_its_deadline(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("no answer within")
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        world.volume(entry).hangs()
        begun = trio.current_time()
        await node.read(entry)
        assert HANG_S <= trio.current_time() - begun < HANG_S + 1
        world.volume(entry).heals()


async def test_it_is_detached_when_nobody_used_it_for_a_while(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        await trio.sleep(2 * IDLE_S)
        assert node.state(entry) == "linked"
        await node.release(entry)
        await trio.sleep(0.9 * IDLE_S)
        assert node.state(entry) == "linked"
        world.overlays.bases.add(entry.base_name)
        node.links.look()
        await trio.sleep(10 * IDLE_S)
        assert node.state(entry) == "linked", "an overlay names it"
        world.overlays.bases.clear()
        world.overlays.is_known = False
        node.links.look()
        await trio.sleep(IDLE_S)
        assert node.state(entry) == "linked", "it is not known whether an overlay names it"
        world.overlays.is_known = True
        node.links.look()
        await node.until_state(entry, "none")
        assert world.cinder.is_clean()
        assert held(world) == set()
        await node.open(entry)
        await node.linked(entry)


async def test_a_boot_trace_waits_for_a_volume_only_where_there_was_one(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        assert not node.links.expects_volume(entry), "who opens it first is not kept waiting for what may be"
        await node.open(entry)
        await node.linked(entry)
        await node.release(entry)
        await node.until_state(entry, "none")
        assert node.links.expects_volume(entry)
        world.volume(entry).image_id = "another"
        await node.open(entry)
        await node.until_state(entry, "refused")
        assert not node.links.expects_volume(entry)


async def test_with_no_idle_time_an_image_is_linked_as_long_as_it_is_open(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world, detach_idle_s=0.0) as node:
        await node.open(entry)
        await node.linked(entry)
        await node.release(entry)
        await node.until_state(entry, "none")
        assert world.cinder.is_clean()


async def test_removal_detaches_at_once_and_stops_what_is_under_way(world: World, clock: MockClock) -> None:
    entry, other = world.add(CONTENT), world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        await node.release(entry)
        await node.handler.remove_image(entry)
        await node.until_state(entry, "none")
        assert world.cinder.is_clean()
        fault = world.cinder.on("connect").hangs(times=1)
        node.handler.warm(other)
        await fault.reached.wait()
        other.local.is_wanted = False  # as unlink does
        await node.handler.remove_image(other)
        await node.until_state(other, "none")
        assert world.cinder.is_clean()


async def test_removal_looks_for_overlays_that_went_before_it(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        await node.release(entry)
        world.overlays.gone.add(entry.base_name)  # as nova does: the instance goes, then its base
        await node.handler.remove_image(entry)
        await node.until_state(entry, "none")
        assert world.cinder.is_clean()


async def test_an_image_that_is_closed_while_it_is_attached_goes_when_it_was_idle(
    world: World, clock: MockClock
) -> None:
    entry = world.add(CONTENT)
    fault = world.cinder.on("connect").hangs(times=1)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await fault.reached.wait()
        await node.release(entry)
        fault.release()
        await node.linked(entry)
        await trio.sleep(2 * IDLE_S)
        assert node.state(entry) == "none"
        assert world.cinder.is_clean()


async def test_novas_pre_cache_call_links_and_keeps_it_until_it_is_removed(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        node.handler.warm(entry)
        assert node.links.is_linked(entry), "the hydrator is not to begin with it"
        await node.linked(entry)
        await trio.sleep(3 * IDLE_S)
        assert node.state(entry) == "linked"
        entry.local.is_wanted = False
        await node.handler.remove_image(entry)
        await node.until_state(entry, "none")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda world, entry: setattr(world.volume(entry), "data", b"x" + CONTENT[1:]), "does not begin with"),
        (lambda world, entry: setattr(world.volume(entry), "image_id", "another"), "has no volume"),
        (lambda _world, entry: setattr(entry.local, "whole", "quarantined"), "did not have the hash"),
        (lambda _world, entry: setattr(entry.local, "cached_bytes", len(CONTENT)), "all of it is here"),
        (lambda _world, entry: setattr(entry, "is_gone", True), "does not give it"),
    ],
    ids=["other bytes", "no volume", "quarantined", "complete", "gone"],
)
async def test_what_is_not_to_be_linked_is_refused_with_the_reason(
    world: World, clock: MockClock, spoil, reason: str
) -> None:
    entry = world.add(CONTENT)
    spoil(world, entry)
    async with a_linking_node(world) as node:
        node.links.want(entry)
        assert await node.links.wait_settled(entry) == "refused"
        assert reason in node.handler.link(entry).reason
        assert not node.links.is_linked(entry), "its bytes come as any other's"
        await node.until(world.cinder.is_clean)
        assert node.handler.link(entry).record is None


async def test_a_volume_smaller_than_the_image_is_refused(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    world.volume(entry).data = CONTENT[:-7]
    world.volume(entry).size = len(CONTENT) - 7
    async with a_linking_node(world) as node:
        await node.open(entry)
        assert await node.links.wait_settled(entry) == "refused"
        await node.read(entry)


async def test_with_require_verified_nothing_is_linked(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world, require_verified=True) as node:
        await node.open(entry)
        assert await node.links.wait_settled(entry) == "refused"
        assert "require_verified" in node.handler.link(entry).reason
        assert world.cinder.steps == ["list"]


async def test_what_forbade_it_here_is_looked_at_again(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    entry.local.whole = "quarantined"
    async with a_linking_node(world) as node:
        await node.open(entry)
        assert await node.links.wait_settled(entry) == "refused"
        entry.local.whole = "unknown"
        await trio.sleep(2 * AT_HAND_AGAIN_S)
        assert node.state(entry) == "linked"


async def test_an_image_that_turns_out_wrong_is_linked_no_more(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        node.links.distrust(entry)
        assert node.state(entry) == "linked", "a damaged chunk of the cache says nothing of the volume"
        entry.local.whole = "refetching"
        image = node.links.image(entry)
        node.links.distrust(entry)
        assert node.state(entry) == "refused"
        assert image.hit(0, 10) is None
        await node.until(world.cinder.is_clean)


@pytest.mark.parametrize("step", ["find", "clone", "reserve", "connect", "open", "complete"])
@pytest.mark.parametrize("late", [False, True])
async def test_an_attach_that_fails_is_undone_and_tried_again(
    world: World, clock: MockClock, step: str, late: bool, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("is not linked to its volume, it is read through Glance, trying again: Cinder answered 500")
    entry = world.add(CONTENT, is_multiattach=False)
    world.cinder.on(step).fails(times=2, late=late)
    async with a_linking_node(world) as node:
        await node.open(entry)
        assert await node.links.wait_settled(entry) == "broken"
        await node.read(entry)
        assert node.links.is_linked(entry), "it is not brought through Glance at once"
        await node.until_state(entry, "linked")
        assert node.links.steps.counters.attach_failures == 2
        assert len(world.cinder.clones()) == len(world.cinder.attachments) == 1
        await node.read(entry)
    assert world.cinder.is_clean()


@pytest.mark.parametrize("step", ["find", "connect"])
async def test_an_attach_that_hangs_is_given_up(
    world: World, clock: MockClock, step: str, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("not attached, in time")
    entry = world.add(CONTENT)
    world.cinder.on(step).hangs(times=1)
    async with a_linking_node(world) as node:
        await node.open(entry)
        assert await node.links.wait_settled(entry) == "broken"
        await node.until_state(entry, "linked")
    assert world.cinder.is_clean()


@pytest.mark.parametrize("step", ["disconnect", "delete_attachment", "delete_clone"])
async def test_a_detach_that_fails_is_tried_until_it_is_done(
    world: World, clock: MockClock, step: str, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("is not detached, trying again: Cinder answered 500")
    entry = world.add(CONTENT, is_multiattach=False)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        world.cinder.on(step).fails(times=3)
        await node.release(entry)
        await node.handler.remove_image(entry)
        await node.until(lambda: node.handler.link(entry).reason is not None)
        assert "not detached: Cinder answered 500" in node.handler.link(entry).reason
        assert "link-connection/1" in held(world), "the next server may have to detach it"
        await node.until_state(entry, "none")
        assert world.cinder.is_clean()
        assert held(world) == set()


async def test_fifty_images_at_once_are_linked_a_few_at_a_time(world: World, clock: MockClock) -> None:
    entries = [world.add(bytes([n]) * 70_000, is_multiattach=n % 2 == 0) for n in range(50)]
    async with a_linking_node(world) as node:
        async with trio.open_nursery() as nursery:
            for entry in entries:
                nursery.start_soon(node.open, entry)
        at_once = 0
        while any(node.state(entry) != "linked" for entry in entries):
            at_once = max(at_once, node.links.steps._turns.borrowed_tokens)
            await trio.lowlevel.checkpoint()
        assert at_once == 4
        for entry in entries:
            await node.read(entry, 100, 1000)
    assert world.cinder.is_clean()


async def test_where_it_became_a_lower_file_it_is_detached(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        entry.local.is_graduated = True
        assert node.links.image(entry) is None
        node.links.look(entry)
        await node.until(world.cinder.is_clean)


# --- an operator


async def test_an_operator_detaches_it(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        with pytest.raises(errors.ControlError, match="is not linked"):
            await node.links.detach(entry, force=True)
        await node.open(entry)
        await node.linked(entry)
        with pytest.raises(errors.ImageBusyError, match=r"in use .open.*--force"):
            await node.links.detach(entry, force=False)
        assert node.state(entry) == "linked"
        was = await node.links.detach(entry, force=True)
        assert was.record.stage == "attached"
        assert world.cinder.is_clean()
        await node.read(entry)
        await trio.sleep(2 * AT_HAND_AGAIN_S)
        assert node.handler.link(entry).reason.startswith("an operator detached it")
        assert world.cinder.is_clean()
        await node.open(entry)
        await node.linked(entry)


async def test_an_operator_is_told_that_it_is_not_detached_yet(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("is not detached, trying again: Cinder answered 500")
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        await node.release(entry)
        fault = world.cinder.on("disconnect").fails()
        with pytest.raises(errors.ControlError, match=r"not detached yet, it is tried again: .*Cinder answered 500"):
            await node.links.detach(entry, force=False)
        fault.error = None
        await node.until(world.cinder.is_clean)


# --- servers that end


async def test_the_next_server_reads_on_from_the_same_device(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        node.kill()
    steps = list(world.cinder.steps)
    requests = world.source.requests
    async with a_linking_node(world) as node:
        assert node.state(entry) == "linked", "before anybody reads"
        await node.read(entry)
        assert world.source.requests == requests
        assert [step for step in world.cinder.steps[len(steps) :] if step != "list"] == []
        await node.release(entry)
        await trio.sleep(2 * IDLE_S)
        assert node.state(entry) == "none"
    assert world.cinder.is_clean()


async def test_an_upgrade_detaches_nothing(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world, unmounts=False) as node:
        await node.open(entry)
        await node.linked(entry)
    assert len(world.cinder.attachments) == 1
    async with a_linking_node(world) as node:
        assert node.state(entry) == "linked"
        await node.read(entry)
    assert world.cinder.is_clean()


STEPS = ["find", "clone", "reserve", "connect", "open", "complete", "disconnect", "delete_attachment", "delete_clone"]


@pytest.mark.parametrize("is_used", [True, False], ids=["used", "unused"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_server_that_is_killed_at_any_step_leaves_nothing(
    world: World, clock: MockClock, step: str, late: bool, is_used: bool
) -> None:
    entry = world.add(CONTENT, is_multiattach=False)
    async with a_linking_node(world) as node:
        fault = world.cinder.on(step).hangs(times=1, late=late)
        await node.open(entry)
        if step in STEPS[6:]:
            await node.linked(entry)
            await node.release(entry)
            await node.handler.remove_image(entry)
        await fault.reached.wait()
        node.kill()
    world.cinder.behave()
    world.opens = {entry.number: 1} if is_used else {}
    async with a_linking_node(world) as node:
        await node.read(entry)
        if is_used:
            await node.release(entry)
        await node.until(world.cinder.is_clean)
        await node.until(lambda: world.noted.get(entry.number) is None)
        assert held(world) == set()
        await node.open(entry)
        await node.linked(entry)
        await node.read(entry)
    assert world.cinder.is_clean()


@pytest.mark.parametrize("is_there", [True, False])
async def test_without_its_fd_an_image_in_use_is_attached_again_and_readers_wait_for_that(
    world: World, clock: MockClock, is_there: bool, expected_warnings: ExpectedWarnings
) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        node.kill()
    world.escrow.close()  # a reboot, but for who has it open
    if not is_there:
        expected_warnings("not linked to its volume.*is gone")
        world.cinder.attachments.clear()
        world.cinder.devices.clear()
    requests = world.source.requests
    async with a_linking_node(world) as node:
        await node.read(entry, MIB + 5, 100)
        if is_there:
            assert node.state(entry) == "linked"
            assert world.source.requests == requests, "it was waited for"
        await node.until_state(entry, "linked")
        await node.read(entry)
    assert world.cinder.is_clean()


async def test_readers_wait_a_bounded_while_for_a_volume_that_does_not_come_back(
    world: World, clock: MockClock
) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        node.kill()
    world.escrow.close()
    fault = world.cinder.on("connect").hangs(times=1)
    async with a_linking_node(world) as node:
        begun = trio.current_time()
        await node.read(entry, MIB + 5, 100)
        assert 4 < trio.current_time() - begun < 6
        begun = trio.current_time()
        await node.read(entry, MIB + 50_000, 100)
        assert trio.current_time() - begun < 1
        fault.release()
        await node.until_state(entry, "linked")
    assert world.cinder.is_clean()


async def test_without_its_fd_what_nobody_uses_is_detached(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        node.kill()
    world.escrow.close()
    world.opens.clear()
    async with a_linking_node(world) as node:
        await node.until(world.cinder.is_clean)
        await node.until_state(entry, "none")


async def test_with_linking_switched_off_what_was_linked_is_detached(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        node.kill()
    async with a_linking_node(world, is_on=False) as node:
        await node.read(entry)
        await node.until(world.cinder.is_clean)
        assert held(world) == set()
        await node.open(entry)
        await trio.sleep(100)
        assert world.cinder.is_clean()


async def test_what_nobody_noted_is_removed(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        node.kill()
    world.noted.clear()  # the state database was lost
    world.opens.clear()
    async with a_linking_node(world) as node:
        await node.until(world.cinder.is_clean)
        assert held(world) == set()


async def test_unmounting_waits_for_no_cinder_that_hangs(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings
) -> None:
    entry = world.add(CONTENT)
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        await node.release(entry)
        world.cinder.on("disconnect").hangs(times=1)
        begun = trio.current_time()
        await node.links.close()
        assert trio.current_time() - begun < 20
        node.kill()
    assert world.noted[entry.number] is not None
    world.opens.clear()
    async with a_linking_node(world) as node:
        await node.until(world.cinder.is_clean)


async def test_where_nothing_can_be_held_it_is_not_linked(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("cannot be held for the next server")
    entry = world.add(CONTENT)
    world.escrow.refuses = OSError(errno.EMFILE, "Too many open files")
    async with a_linking_node(world) as node:
        await node.open(entry)
        assert await node.links.wait_settled(entry) == "broken"
        await node.until(world.cinder.is_clean)
        world.escrow.refuses = None
        await node.until_state(entry, "linked")
    assert world.cinder.is_clean()

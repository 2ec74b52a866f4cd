"""A fault at each step, on a real Cinder behind a front: nothing is left that is not noted."""

import contextlib
import os
import threading

import pytest
import trio

from basefs import errors
from basefs.volumes import attaching, cinder, removing
from tests.contract.volume_worlds import Notes, RealWorld
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront

pytestmark = [pytest.mark.glance, pytest.mark.cinder]
DATA = b"an image of few bytes" * 100
OWN_404 = {"X-Openstack-Request-Id": "req-1"}
LIE = "not done, and answered 404 by Cinder"
FAULTS = {
    "done, and answered 500": (answers.status(500), False),
    "not done, and answered 500": (answers.status(500), True),
    "not done, and answered 409": (answers.status(409), True),
    LIE: (answers.status(404, OWN_404), True),
    "not done, and answered 404 by a proxy": (answers.status(404), True),
    "done, and the connection reset": (answers.reset(), False),
    "done, and answered rubbish": (answers.status(200, body=b"[1, 2"), False),
}
ATTACH_STEPS = [
    ("GET", "/attachments", 0),
    ("POST", "/attachments", 0),
    ("PUT", "/attachments/", 0),
    ("POST", "/action", 0),
]
CLONE_STEPS = [("POST", "/volumes", 0), ("GET", "/volumes/", 1), ("POST", "/action", 0)]
DETACH_STEPS = [("GET", "/attachments", 0), ("GET", "/attachments/", 0), ("DELETE", "/attachments/", 0)]
CLONE_DETACH_STEPS = [("DELETE", "/volumes/", 0), ("GET", "/volumes/", 0)]


@pytest.fixture
def front(cinder_rig):
    with MisbehavingFront(upstream=cinder_rig.cinder_url) as running:
        yield running


@pytest.fixture
def world(cinder_rig, front, tmp_path, behaviour, monkeypatch):
    # What may be ours is ours at once; the other way is tried in a test of its own.
    monkeypatch.setattr(removing, "LOST_AFTER_S", 0.0)
    monkeypatch.setattr(cinder, "GRACE_S", 30.0)
    made = RealWorld(cinder_rig, tmp_path, cinder_rig.conf_lines().replace(cinder_rig.cinder_url, f"{front.url}/v3"))
    made.helper_command = behaviour.command
    yield made
    made.close()


@pytest.fixture
def links(world, nursery):
    return world.links("node-a", nursery)


@pytest.fixture
def impatient(world, nursery):
    return world.links("node-a", nursery, "attach_deadline_s = 1")


async def attach_and_detach(links, found, image, note):
    attached = await links.attach(image, found, note)
    assert attached.bytes.read(0, len(DATA)) == DATA
    attached.bytes.close()
    try:
        await links.detach(attached.record, None, note)
    finally:
        os.close(attached.connection_fd)


async def settle(links, note):
    """What a handler does with a record that is left, later."""
    while note.records and note.last is not None:
        with contextlib.suppress(errors.VolumeError):
            await links.detach(note.last, None, note)


def assert_clean(world, note, case):
    assert (world.attachments(), world.clones()) == ([], []), case
    assert not note.records or note.last is None, case


@pytest.mark.parametrize(
    ("is_multiattach", "steps"),
    [(True, ATTACH_STEPS), (False, CLONE_STEPS), (True, DETACH_STEPS), (False, CLONE_DETACH_STEPS)],
    ids=["attach", "attach a clone", "detach", "detach a clone"],
)
async def test_whatever_cinder_answers_to_a_step_nothing_is_left(world, front, links, is_multiattach, steps):
    image = world.image(DATA, is_multiattach=is_multiattach)
    found = await links.find(image)
    for number, (method, path, to_pass) in enumerate(steps):
        # Every other one, in turn, for time; each fault meets each kind of step.
        for name, (fault, is_instead) in list(FAULTS.items())[number % 2 :: 2]:
            if (method, name) == ("DELETE", LIE):
                continue
            case = f"{method} {path}: {name}"
            rule = front.on(path, method).after(to_pass).respond(fault, times=1)
            rule.is_instead = is_instead
            note = Notes()
            with contextlib.suppress(errors.VolumeError):
                await attach_and_detach(links, found, image, note)
            assert rule.hits == 1, case
            front.behave()
            await settle(links, note)
            assert_clean(world, note, case)


async def test_a_clone_that_is_refused_while_glance_reads_the_volume_is_asked_for_again(world, front, links):
    image, note = world.image(DATA, is_multiattach=False), Notes()
    found = await links.find(image)
    rule = front.on("/volumes", "POST").respond(answers.status(400), times=2)
    rule.is_instead = True
    await attach_and_detach(links, found, image, note)
    assert rule.hits == 2
    assert_clean(world, note, "refused twice")


@pytest.mark.parametrize(("method", "path"), [("POST", "/attachments"), ("PUT", "/attachments/"), ("POST", "/action")])
async def test_a_step_that_hangs_ends_with_the_deadline(world, front, impatient, monkeypatch, method, path):
    monkeypatch.setattr(cinder, "GRACE_S", 0.2)
    links = impatient
    image, note = world.image(DATA), Notes()
    found = await links.find(image)
    front.on(path, method).respond(answers.hang(threading.Event()), times=1).instead()
    with pytest.raises(errors.VolumeError, match="is not attached within 1 s"):
        await links.attach(image, found, note)
    await settle(links, note)
    assert_clean(world, note, path)


async def test_while_cinder_is_away_what_was_begun_stays_noted(world, front, links):
    image, note = world.image(DATA), Notes()
    found = await links.find(image)
    front.on("/action", "POST").respond(answers.status(503))
    front.on("", "GET").after(1).respond(answers.status(503)).instead()
    front.on("", "DELETE").respond(answers.status(503)).instead()
    with pytest.raises(errors.VolumeError, match="complete: Cinder answered 503"):
        await links.attach(image, found, note)
    assert note.last is not None
    assert note.last.stage == "detaching"
    assert world.attachments() == [note.last.attachment_id]
    with pytest.raises(errors.VolumeError):
        await links.detach(note.last, None, note)
    front.behave()
    await settle(links, note)
    assert_clean(world, note, "away")


async def test_while_cinder_is_away_a_record_is_kept_for_the_next_try_to_reopen_it(world, front, links):
    image, note = world.image(DATA), Notes()
    attached = await links.attach(image, await links.find(image), note)
    attached.bytes.close()
    os.close(attached.connection_fd)
    front.on("/attachments", "GET").respond(answers.status(503)).instead()
    with pytest.raises(errors.VolumeError, match="503"):
        await links.reopen(image, attached.record, note)
    assert note.last == attached.record
    front.behave()
    await settle(links, note)
    assert_clean(world, note, "away")


async def test_an_attachment_that_may_be_another_hosts_is_left_alone_for_a_while(world, front, links, monkeypatch):
    monkeypatch.setattr(removing, "LOST_AFTER_S", 3600.0)
    image, note = world.image(DATA), Notes()
    found = await links.find(image)
    front.on("/attachments", "POST").respond(answers.reset(), times=1)
    with pytest.raises(errors.VolumeError):
        await links.attach(image, found, note)
    assert len(world.attachments()) == 1
    with pytest.raises(errors.VolumeError, match="whether one is ours can be told in 3600 s"):
        await links.detach(note.last, None, note)
    monkeypatch.setattr(removing, "LOST_AFTER_S", 0.0)
    await links.detach(note.last, None, note)
    assert_clean(world, note, "lost")


async def test_an_attachment_that_another_host_is_making_is_waited_for(world, impatient, cinder_rig, links):
    image, note = world.image(DATA), Notes()
    found = await links.find(image)
    api = cinder_rig.cinder_api()
    other = api.call("POST", "/attachments", {"attachment": {"volume_uuid": found.volume_id, "mode": "ro"}})[1]
    with pytest.raises(errors.VolumeError, match="within 1 s"):
        await impatient.attach(image, found, note)
    assert note.last is None, "nothing was made, so nothing of another's is suspected to be ours"
    assert world.attachments() == [other["attachment"]["id"]]
    api.delete_attachment(other["attachment"]["id"])
    await attach_and_detach(links, found, image, note)


@pytest.mark.parametrize("word", ["die", "error", "hang", "late", "garbage", "unasked"])
@pytest.mark.parametrize("kind", ["properties", "connect", "disconnect"])
async def test_whatever_the_helper_does_nothing_is_left(world, links, impatient, behaviour, monkeypatch, kind, word):
    image, note = world.image(DATA), Notes()
    if (kind, word) in (("connect", "hang"), ("connect", "late")):
        links = impatient
    found = await links.find(image)
    behaviour.is_to(**{kind: word})
    with contextlib.suppress(errors.VolumeError), monkeypatch.context() as patched:
        if word in ("hang", "late"):
            patched.setattr("basefs.volumes.brick.DISCONNECT_LIMIT_S", 0.5)
            patched.setattr("basefs.volumes.brick.PROPERTIES_LIMIT_S", 0.5)
        await attach_and_detach(links, found, image, note)
    behaviour.is_to()
    await settle(links, note)
    assert_clean(world, note, f"{kind}: {word}")


async def test_cancellation_at_any_time_leaves_nothing_or_a_note(world, links, front):
    image = world.image(DATA)
    found = await links.find(image)
    for requests in range(1, 5):
        note = Notes()
        before = front.count()
        over = threading.Event()
        async with trio.open_nursery() as life:
            life.start_soon(suppressed, links, found, image, note, over)
            await trio.to_thread.run_sync(wait_for_requests, front, before + requests, over)
            life.cancel_scope.cancel()
        await settle(links, note)
        assert_clean(world, note, requests)


async def suppressed(links, found, image, note, over):
    try:
        with contextlib.suppress(errors.VolumeError):
            await attach_and_detach(links, found, image, note)
    finally:
        over.set()


def wait_for_requests(front, count, over):
    """Or for the end of who makes them: one that fails early makes fewer."""
    while front.count() < count and not over.wait(0.005):
        pass


async def test_a_device_that_is_smaller_than_the_image_is_refused(world, links, cinder_rig, nursery):
    image = world.image(DATA)
    found = await links.find(image)
    too_big = type(image)(image_id=image.image_id, size=(1 << 30) + 1)
    note = Notes()
    with pytest.raises(errors.NoVolumeError, match="has 1073741824 bytes, less than the image's 1073741825"):
        await links.attach(too_big, found, note)
    assert_clean(world, note, "small")


async def test_no_secret_of_a_connection_is_logged(world, links, caplog, monkeypatch):
    caplog.set_level("DEBUG")
    secret = "Zq7-chap-password"
    connect = attaching.Cinder.connect

    async def with_secret(self, attachment_id, connector):
        return {**await connect(self, attachment_id, connector), "auth_password": secret}

    monkeypatch.setattr(attaching.Cinder, "connect", with_secret)
    image, note = world.image(DATA), Notes()
    attached = await links.attach(image, await links.find(image), note)
    attached.bytes.close()
    await links.detach(attached.record, attached.connection_fd, note)
    os.close(attached.connection_fd)
    assert secret not in caplog.text
    assert secret not in str(note.records)
    assert "/dev/loop" not in caplog.text, "no answer of Cinder is logged, whatever it holds"

"""The catalog knows what Glance has, asks it about unknown names only, and never takes "unknown" for "absent"."""

import logging

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.catalog import glance_catalog, refresher
from basefs.catalog.records import Verdict
from basefs.core.names import base_name_of

NOBODY = "0123456789abcdef" * 2 + "01234567"
LOST = errors.SourceUnavailableError("Glance answered 503")
LOST_RECORD = "the image catalog cannot be refreshed, known images stay: "


# --- what is found -------------------------------------------------------------------------------------


async def test_images_are_found_by_base_name_id_number_and_name(glance, lives, autojump_clock):
    image = glance.add(b"x" * 10, name="disk", os_hidden=True)
    queued = glance.add(None, name="coming")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    entry = catalog.by_id(image)
    assert entry is catalog.by_base_name(base_name_of(image)) is catalog.by_number(entry.number)
    assert entry is catalog.find(image) is catalog.find(entry.base_name) is catalog.find("disk")
    assert entry is await catalog.resolve(entry.base_name)
    assert (entry.size, entry.record.os_hidden, entry.verdict.state) == (10, True, "unchecked")
    assert (catalog.by_id(queued).size, catalog.by_id(queued).record.status) == (0, "queued")
    assert len(catalog) == len(catalog.entries()) == 2
    assert catalog.by_id("none") is catalog.by_number(99) is catalog.by_base_name(NOBODY) is None


async def test_a_name_that_fits_several_images_is_ambiguous(glance, lives, autojump_clock):
    first, second = glance.add(b"x", name="disk"), glance.add(b"y", name="disk")
    catalog = await lives.begin()
    await catalog.refresh()
    with pytest.raises(errors.AmbiguousImageError, match=f"2 images.*{first}.*{second}"):
        catalog.find("disk")
    with pytest.raises(errors.ImageNotFoundError, match="'disc'"):
        catalog.find("disc")
    catalog.by_id(first).is_gone = True
    assert catalog.find("disk").image_id == second


async def test_unusable_records_are_left_out(glance, lives, autojump_clock):
    for bad in (".", "..", ".x", "a/b", "a\0b", "ä", "x" * 65, " ", "a\n"):
        glance.add(b"x", id=bad)
    glance.add(b"x", id="no-status", status=None)
    good = glance.add(b"x", id="with-surrogate", name="\ud800 half")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    assert [entry.image_id for entry in catalog.entries()] == [good]
    assert catalog.by_id(good).record.name == "? half"


@pytest.mark.parametrize("size", [-1, 2**63, "many", 1.5, True, None])
async def test_a_size_that_is_none_is_unknown(glance, lives, autojump_clock, size):
    image = glance.add(b"x", size=size)
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    assert (catalog.by_id(image).record.size, catalog.by_id(image).size) == (None, 0)


# --- refreshing ------------------------------------------------------------------------------------------


async def test_an_incremental_refresh_asks_for_what_changed_and_a_little_more(glance, metadata, lives, autojump_clock):
    images = [glance.add(b"x", name=str(n)) for n in range(60)]
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    numbers = {entry.image_id: entry.number for entry in catalog.entries()}
    glance.change(images[3], status="deactivated")
    new = glance.add(b"y")
    await catalog.refresh()
    newest = glance.images[images[-1]]["updated_at"]
    assert metadata.lists[0] is None
    assert metadata.lists[1] < newest
    assert catalog.by_id(images[3]).record.status == "deactivated"
    assert catalog.by_id(new).number == 61
    assert {entry.image_id: entry.number for entry in catalog.entries() if entry.image_id != new} == numbers


async def test_a_change_of_status_or_content_is_checked_again(glance, lives, autojump_clock):
    image = glance.add(b"x" * 10)
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    entry = catalog.by_id(image)
    entry.verdict = Verdict(state="servable")
    glance.change(image, status="deactivated")
    await catalog.refresh()
    assert (entry.verdict.state, entry.record.status) == ("servable", "deactivated")
    glance.change(image, size=11)
    await catalog.refresh()
    assert entry.verdict.state == "unchecked"
    entry.verdict = Verdict(state="refused", reason="not active")
    glance.change(image, status="active")
    await catalog.refresh()
    assert entry.verdict.state == "unchecked"
    assert lives.store.rows[image].verdict.state == "unchecked"


async def test_an_image_missing_from_a_full_list_is_gone_only_by_its_own_404(
    glance, metadata, lives, autojump_clock, caplog
):
    caplog.set_level(logging.INFO)
    deleted, unlisted = glance.add(b"x"), glance.add(b"y")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    glance.delete(deleted)
    metadata.hidden_from_lists.add(unlisted)
    await catalog.refresh()
    assert not catalog.by_id(deleted).is_gone
    await catalog.refresh(full=True)
    assert catalog.by_id(deleted).is_gone
    assert not catalog.by_id(unlisted).is_gone
    assert metadata.shows == [deleted, unlisted]
    assert [r.getMessage() for r in caplog.records if deleted in r.getMessage()] == [
        f"image {deleted} ({base_name_of(deleted)}): gone from Glance"
    ]
    # Neither a restart nor a later list makes it anything else; only Glance does.
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    assert catalog.by_id(deleted).is_gone
    assert metadata.shows[2:] == [unlisted]
    glance.add(b"x", id=deleted)
    await catalog.refresh(full=True)
    assert not catalog.by_id(deleted).is_gone


async def test_an_image_glance_does_not_talk_about_is_not_gone(
    glance, metadata, lives, autojump_clock, expected_warnings
):
    expected_warnings(LOST_RECORD)
    image = glance.add(b"x")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    glance.delete(image)
    show_image = metadata.show_image

    for error in (LOST, errors.SourceForbiddenError("403")):

        async def refused(image_id, error=error):
            raise error

        metadata.show_image = refused
        with pytest.raises(type(error)):
            await catalog.refresh(full=True)
        assert not catalog.by_id(image).is_gone
    metadata.show_image = show_image
    await catalog.refresh(full=True)
    assert catalog.by_id(image).is_gone


async def test_one_image_can_be_asked_about(glance, metadata, lives, autojump_clock):
    image = glance.add(b"x")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    entry = catalog.by_id(image)
    glance.change(image, status="deactivated")
    await catalog.recheck(entry)
    assert (entry.record.status, entry.is_gone) == ("deactivated", False)
    metadata.error = LOST
    with pytest.raises(errors.SourceUnavailableError):
        await catalog.recheck(entry)
    assert not entry.is_gone
    metadata.error = None
    glance.delete(image)
    await catalog.recheck(entry)
    assert entry.is_gone


async def test_a_list_that_could_not_be_had_changes_nothing(glance, metadata, lives, autojump_clock, expected_warnings):
    expected_warnings(LOST_RECORD)
    images = [glance.add(b"x") for _ in range(25)]
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    glance.add(b"y")
    metadata.error = LOST
    for full in (True, False):
        with pytest.raises(errors.SourceUnavailableError):
            await catalog.refresh(full=full)
    assert [entry.image_id for entry in catalog.entries() if not entry.is_gone] == images


@pytest.mark.parametrize("updated_at", ["2199-01-01T00:00:00Z", "zzz", "", None, "9999-99-99T99:99:99Z"])
async def test_a_strange_time_does_not_hide_later_changes(glance, lives, autojump_clock, updated_at):
    glance.add(b"x")
    glance.add(b"x", updated_at=updated_at or "")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    new = glance.add(b"y")
    await catalog.refresh()
    assert catalog.by_id(new) is not None


async def test_a_slow_full_list_does_not_bring_back_what_is_older(glance, metadata, lives, autojump_clock):
    image = glance.add(b"x", name="old")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    metadata.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: catalog.refresh(full=True))
        await trio.testing.wait_all_tasks_blocked()
        hold, metadata.hold = metadata.hold, None
        glance.change(image, name="new")
        new = glance.add(b"y")
        await catalog.refresh()
        hold.set()
    assert catalog.by_id(image).record.name == "new"
    assert not catalog.by_id(new).is_gone
    assert metadata.shows == []


async def test_refreshes_of_one_kind_are_one(glance, metadata, lives, autojump_clock):
    catalog = await lives.begin()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(lambda: catalog.refresh(full=True))
            nursery.start_soon(catalog.refresh)
    assert len(metadata.lists) == 2


# --- restart -----------------------------------------------------------------------------------------------


async def test_a_start_without_glance_knows_what_was_known(glance, metadata, lives, autojump_clock, expected_warnings):
    expected_warnings(LOST_RECORD)
    image = glance.add(b"x")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    number = catalog.by_id(image).number
    catalog.by_id(image).verdict = Verdict(state="servable")
    catalog.touch(catalog.by_id(image))
    metadata.error = LOST
    catalog = await lives.begin()
    entry = await catalog.resolve(base_name_of(image))
    assert (entry.image_id, entry.number, entry.verdict.state) == (image, number, "servable")
    with pytest.raises(errors.SourceUnavailableError):
        await catalog.refresh()
    metadata.error = None
    new = glance.add(b"y")
    await catalog.refresh()
    assert catalog.by_id(new).number > number
    assert metadata.lists[-1] is not None


async def test_a_forgotten_image_is_unknown_and_its_number_stays_unused(glance, lives, autojump_clock):
    image = glance.add(b"x")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    glance.delete(image)
    await catalog.refresh(full=True)
    await catalog.forget(catalog.by_id(image))
    assert len(catalog) == 0
    catalog = await lives.begin()
    new = glance.add(b"y")
    await catalog.refresh()
    assert [(entry.image_id, entry.number) for entry in catalog.entries()] == [(new, 2)]


async def test_what_the_store_does_not_take_is_not_shown(glance, lives, autojump_clock, expected_warnings):
    expected_warnings(LOST_RECORD + "disk full")
    catalog = await lives.begin()
    image = glance.add(b"x")
    lives.store.error = errors.CacheError("disk full")
    with pytest.raises(errors.CacheError):
        await catalog.refresh()
    with pytest.raises(errors.CacheError):
        await catalog.resolve(base_name_of(image))
    assert len(catalog) == 0
    lives.store.error = None
    assert (await catalog.resolve(base_name_of(image))).number == 1


# --- resolving ----------------------------------------------------------------------------------------------


async def test_a_known_active_image_needs_no_glance(glance, metadata, lives, autojump_clock):
    image = glance.add(b"x")
    catalog = await lives.begin()
    await catalog.refresh()
    metadata.error = LOST
    for _ in range(100):
        assert (await catalog.resolve(base_name_of(image))).image_id == image
    assert len(metadata.lists) == 1


@pytest.mark.parametrize("name", ["", "x", NOBODY + "_sm", NOBODY[:-1], NOBODY.upper(), NOBODY[:-1] + "g", "swap_1"])
async def test_what_is_no_base_name_never_reaches_glance(metadata, lives, autojump_clock, name):
    catalog = await lives.begin()
    assert await catalog.resolve(name) is None
    assert metadata.lists == []


async def test_an_image_made_a_moment_ago_is_found(glance, lives, autojump_clock):
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    for _ in range(2):
        image = glance.add(b"x")
        assert (await catalog.resolve(base_name_of(image))).image_id == image


async def test_many_unknown_names_ask_glance_once(metadata, lives, autojump_clock):
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    names = [f"{n:040x}" for n in range(200)]
    found = []

    async def ask(name):
        found.append(await catalog.resolve(name))

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(ask, name)
    assert found == [None] * 200
    assert len(metadata.lists) == 2
    for name in names:
        assert await catalog.resolve(name) is None
    assert len(metadata.lists) == 2


async def test_an_absent_name_is_asked_about_again_after_five_seconds(metadata, lives, autojump_clock):
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    assert await catalog.resolve(NOBODY) is None
    assert len(metadata.lists) == 2
    await trio.sleep(4.9)
    assert await catalog.resolve(NOBODY) is None
    assert len(metadata.lists) == 2
    await trio.sleep(0.2)
    assert await catalog.resolve(NOBODY) is None
    assert len(metadata.lists) == 3


async def test_lookups_cause_at_most_one_list_a_second(metadata, lives, autojump_clock):
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    began_at = trio.current_time()
    for n in range(10):
        assert await catalog.resolve(f"{n:040x}") is None
    assert len(metadata.lists) == 11
    assert trio.current_time() - began_at >= 9


async def test_an_image_shared_with_us_without_a_new_updated_at_is_found(glance, metadata, lives, autojump_clock):
    glance.add(b"x")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    shared = glance.add(b"y", updated_at="2020-01-01T00:00:00Z")
    await trio.sleep(glance_catalog.FULL_AFTER_MISS_S + 1)
    assert (await catalog.resolve(base_name_of(shared))).image_id == shared
    asked = len(metadata.lists)
    assert await catalog.resolve(NOBODY) is None
    assert metadata.lists[asked:] != []
    assert None not in metadata.lists[asked:]


async def test_an_image_that_is_not_active_is_asked_about(glance, metadata, lives, autojump_clock):
    image = glance.add(None)
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    entry = await catalog.resolve(base_name_of(image))
    assert entry.record.status == "queued"
    asked = len(metadata.shows)
    assert await catalog.resolve(base_name_of(image)) is entry
    assert len(metadata.shows) == asked
    glance.change(image, status="active", size=1)
    await trio.sleep(6)
    assert await catalog.resolve(base_name_of(image)) is entry
    assert (entry.record.status, entry.size) == ("active", 1)


async def test_an_image_called_gone_by_mistake_is_back_when_it_is_asked_for(glance, lives, autojump_clock):
    image = glance.add(b"x")
    for _ in range(30):
        glance.add(b"later")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    entry = catalog.by_id(image)
    entry.is_gone = True
    assert await catalog.resolve(base_name_of(image)) is entry
    assert not entry.is_gone


async def test_asking_about_one_image_hides_no_change_of_another(glance, metadata, lives):
    first = glance.add(b"x", name="old")
    second = glance.add(b"y")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    glance.change(first, name="new")
    for _ in range(30):
        glance.change(second, name="changed")
    await catalog.recheck(catalog.by_id(second))
    await catalog.refresh()
    assert catalog.by_id(first).record.name == "new"


@pytest.mark.parametrize("error", [LOST, errors.SourceForbiddenError("401"), errors.SourceForbiddenError("403")])
async def test_unknown_is_not_absent_while_glance_cannot_be_asked(
    glance, metadata, lives, autojump_clock, error, expected_warnings
):
    expected_warnings(LOST_RECORD)
    image = glance.add(None)
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    metadata.error = error
    with pytest.raises(errors.SourceUnavailableError, match=NOBODY):
        await catalog.resolve(NOBODY)
    # What is known, though not active, is answered with what is known.
    assert (await catalog.resolve(base_name_of(image))).image_id == image
    metadata.error = None
    assert await catalog.resolve(NOBODY) is None


async def test_a_lookup_ends_at_its_deadline_and_the_refresh_goes_on(glance, metadata, lives, autojump_clock):
    catalog = await lives.begin()
    image = glance.add(b"x")
    metadata.hold = trio.Event()
    began_at = trio.current_time()
    with pytest.raises(errors.SourceUnavailableError, match="no answer in 5 s"):
        await catalog.resolve(base_name_of(image))
    assert trio.current_time() - began_at == pytest.approx(5.0)
    metadata.hold.set()
    await trio.testing.wait_all_tasks_blocked()
    assert (await catalog.resolve(base_name_of(image))).image_id == image
    assert len(metadata.lists) == 1


async def test_a_name_is_absent_only_by_a_list_begun_after_it_was_asked_for(glance, metadata, lives, autojump_clock):
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    metadata.hold = trio.Event()
    found = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(catalog.refresh)
        await trio.testing.wait_all_tasks_blocked()
        image = glance.add(b"x")  # the list under way was put together before

        async def ask():
            found.append(await catalog.resolve(base_name_of(image)))

        await trio.sleep(0.5)
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        metadata.hold.set()
    assert [entry.image_id for entry in found] == [image]
    assert len(metadata.lists) == 3


async def test_a_cancelled_lookup_leaves_the_refresh_to_the_others(glance, metadata, lives, autojump_clock):
    catalog = await lives.begin()
    image = glance.add(b"x")
    metadata.hold = trio.Event()
    with trio.move_on_after(1):
        await catalog.resolve(base_name_of(image))
    metadata.hold.set()
    await trio.testing.wait_all_tasks_blocked()
    assert catalog.by_id(image) is not None
    assert len(metadata.lists) == 1


# --- the loop ------------------------------------------------------------------------------------------------


async def test_the_loop_tells_once_that_glance_is_lost_and_once_that_it_is_back(
    glance, metadata, lives, autojump_clock, nursery, caplog, expected_warnings
):
    expected_warnings(LOST_RECORD + "Glance answered 503")
    caplog.set_level(logging.INFO)
    catalog = await lives.begin(refresh_s=30.0)
    metadata.error = LOST
    nursery.start_soon(catalog.run)
    await trio.sleep(300)
    # 0.5 to 1, 1 to 2, 2 to 4, ... and then every 15 to 30 s.
    assert 14 <= len(metadata.lists) <= 26
    assert catalog.refreshed_at is None
    image = glance.add(b"x")
    metadata.error = None
    await trio.sleep(31)
    assert catalog.by_id(image) is not None
    assert catalog.refreshed_at is not None
    own = [(r.levelname, r.getMessage()) for r in caplog.records if r.name.startswith("basefs")]
    assert own == [
        ("WARNING", LOST_RECORD + "Glance answered 503"),
        ("INFO", "the image catalog is refreshed again"),
    ]
    nursery.cancel_scope.cancel()


async def test_the_loop_refreshes_every_refresh_s_give_or_take_a_tenth(
    glance, metadata, lives, autojump_clock, nursery
):
    catalog = await lives.begin(refresh_s=60.0)
    nursery.start_soon(catalog.run)
    await trio.sleep(3600)
    assert 3600 / 66 <= len(metadata.lists) <= 3600 / 54 + 1
    new = glance.add(b"y")
    await trio.sleep(67)
    assert catalog.by_id(new) is not None
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("age_s", "is_full"), [(0, False), (3000, False), (4000, True), (-100, True)])
async def test_a_restarted_loop_lists_all_only_if_the_last_time_was_long_ago(
    glance, metadata, lives, autojump_clock, nursery, monkeypatch, age_s, is_full
):
    glance.add(b"x")
    monkeypatch.setattr(refresher.time, "time", lambda: 1_795_000_000.0)
    await (await lives.begin()).refresh(full=True)
    catalog = await lives.begin()
    monkeypatch.setattr(refresher.time, "time", lambda: 1_795_000_000.0 + age_s)
    nursery.start_soon(catalog.run)
    await trio.sleep(10)
    assert [since is None for since in metadata.lists[1:]] == [is_full]
    nursery.cancel_scope.cancel()


async def test_in_an_outage_look_ups_are_answered_at_once_from_what_is_known(glance, metadata, lives, autojump_clock):
    known = glance.add(b"x")
    inactive = glance.add(b"y", status="deactivated")
    catalog = await lives.begin()
    await catalog.refresh(full=True)
    lists, began = len(metadata.lists), trio.current_time()
    away = errors.SourceUnavailableError("Glance is away: refused", may_be_away=True, is_outage=True)
    lives.outage.begin(away)
    metadata.error = away
    assert (await catalog.resolve(base_name_of(known))).image_id == known
    assert (await catalog.resolve(base_name_of(inactive))).image_id == inactive
    for n in range(100):
        with pytest.raises(errors.SourceUnavailableError, match="Glance is away") as caught:
            await catalog.resolve(base_name_of(f"unknown {n}"))
        assert caught.value.is_outage
    assert trio.current_time() == began
    assert len(metadata.lists) == lists
    metadata.error = None
    lives.outage.end()
    assert await catalog.resolve(base_name_of("unknown 1")) is None


async def test_the_end_of_an_outage_brings_a_fresh_list_within_seconds(
    glance, metadata, lives, autojump_clock, nursery
):
    away = errors.SourceUnavailableError("Glance is away: refused", may_be_away=True, is_outage=True)
    metadata.error = away
    lives.outage.begin(away)
    catalog = await lives.begin(refresh_s=3600.0)
    nursery.start_soon(catalog.run)
    await trio.sleep(1000)
    image = glance.add(b"x")
    metadata.error = None
    lives.outage.end()
    await trio.sleep(refresher.SPREAD_S + 0.1)
    assert catalog.by_id(image) is not None

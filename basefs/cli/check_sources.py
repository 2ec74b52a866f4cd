"""Checks of the stores behind Glance: configured, told of by Glance, and answering. Without them Glance is read."""

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import trio
from oslo_config.cfg import ConfigOpts

from basefs.cli.findings import Finding, error, ok, warning
from basefs.concurrency.threads import BlockingCalls
from basefs.config import Settings
from basefs.core.location_kinds import endpoint_of, kind_of
from basefs.errors import BasefsError, ConfigError
from basefs.sources.access import GlanceAccess, open_glance
from basefs.sources.file_locations import FileLocations
from basefs.sources.locations import GlanceLocations
from basefs.sources.metadata import GlanceMetadata
from basefs.sources.store import Store
from basefs.sources.stores import open_stores

DEADLINE_S = 60.0
IMAGES_MAX = 20
"""So many images are asked for their locations, at most."""
OPEN_LIMIT_S = 10.0
_INSTEAD = "images are read from their next source, the last is Glance"

Located = tuple[str, int, str]
"""Image id, size, location."""


def check_sources(conf: ConfigOpts, settings: Settings) -> list[Finding]:
    """Everything about stores, in at most about DEADLINE_S seconds."""
    try:
        stores = open_stores(settings, conf, threads_max=1)
    except ConfigError as exc:
        return [error("sources", str(exc))]
    files = _files(settings)
    unreadable = _unreadable_ceph_conf(settings)
    if unreadable:
        stores = [store for store in stores if store.name != "rbd"]
        if not stores and files is None:
            return unreadable
    if not stores and files is None:
        return [ok("sources", "images are read from Glance: no store behind it is configured")]
    try:
        access = open_glance(conf, threads_max=1)
    except ConfigError as exc:
        return [*unreadable, error("sources", str(exc))]
    return [*unreadable, *trio.run(_check_sources, access, stores, files)]


def _unreadable_ceph_conf(settings: Settings) -> list[Finding]:
    """Told whether there is an image in Ceph now or not."""
    if settings.rbd is None or "rbd" not in settings.source_order:
        return []
    try:
        with open(settings.rbd.ceph_conf, "rb"):
            return []
    except OSError as exc:
        return [warning("rbd", f"[rbd] ceph_conf = {settings.rbd.ceph_conf}: {exc.strerror}; {_INSTEAD}")]


def _files(settings: Settings) -> FileLocations | None:
    options = settings.file_location
    is_used = options.directories and "file" in settings.source_order
    return FileLocations(options.directories, any_name=options.any_name) if is_used else None


async def _check_sources(access: GlanceAccess, stores: Sequence[Store], files: FileLocations | None) -> list[Finding]:
    findings: list[Finding] = []
    with trio.move_on_after(DEADLINE_S) as limit:
        try:
            told = [one async for one in _locations(access)]
        except BasefsError as exc:
            findings.append(warning("sources", f"{exc}: {_INSTEAD}"))
        else:
            findings += [await _check_store(store, told) for store in stores]
            findings += [] if files is None else [await _check_files(files, told)]
        for store in stores:
            await store.close()
    access.close()
    if limit.cancelled_caught:
        findings.append(warning("sources", f"no answer within {DEADLINE_S:g} s: {_INSTEAD}"))
    return findings


async def _locations(access: GlanceAccess) -> AsyncIterator[Located]:
    locations = GlanceLocations(access)
    images: list[Mapping[str, Any]] = await GlanceMetadata(access).list_images()
    for image in [one for one in images if one.get("status") == "active"][:IMAGES_MAX]:
        for location in await locations.locations(str(image["id"])):
            yield str(image["id"]), int(image.get("size") or 0), location


def _of_kind(name: str, told: Sequence[Located]) -> Iterator[Located]:
    return (one for one in told if kind_of(one[2]) == name)


def _none_told(name: str, told: Sequence[Located]) -> Finding:
    if told:
        return ok(name, f"configured; of the first {IMAGES_MAX} images none has a location there")
    advice = "it tells them to admin and the role service, or with show_multiple_locations"
    return warning(name, f"Glance tells us no location of the first {IMAGES_MAX} images: {advice}; {_INSTEAD}")


async def _check_store(store: Store, told: Sequence[Located]) -> Finding:
    """Open the first image that may be read there."""
    if store.missing is not None:
        return warning(store.name, f"{store.missing}; {_INSTEAD}")
    reason = ""
    for image_id, size, location in _of_kind(store.name, told):
        refusal = store.refusal(image_id, location)
        if refusal is not None:
            reason = f"image {image_id}: {refusal}"
            continue
        try:
            with trio.fail_after(OPEN_LIMIT_S):
                found = await store.open(location, image_id=image_id, size=size)
                await found.close()
        except (BasefsError, trio.TooSlowError) as exc:
            text = str(exc) or f"no answer within {OPEN_LIMIT_S:g} s"
            return warning(store.name, f"image {image_id}: {text}: {_INSTEAD}")
        return ok(store.name, f"{endpoint_of(location)} answers; image {image_id} can be read there")
    return warning(store.name, f"{reason}: {_INSTEAD}") if reason else _none_told(store.name, told)


async def _check_files(files: FileLocations, told: Sequence[Located]) -> Finding:
    """The same for files that are read in place."""
    reason = ""
    for image_id, size, location in _of_kind("file", told):
        reason = f"image {image_id}: {files.refusal(image_id, location)}"
        if files.refusal(image_id, location) is not None:
            continue
        try:
            await BlockingCalls("files", threads_max=1).run_within(OPEN_LIMIT_S, _open_and_close, files, location, size)
        except (BasefsError, trio.TooSlowError) as exc:
            text = str(exc) or f"no answer within {OPEN_LIMIT_S:g} s"
            return warning("file", f"image {image_id}: {text}: {_INSTEAD}")
        return ok("file", f"image {image_id} can be read in place")
    return warning("file", f"{reason}: {_INSTEAD}") if reason else _none_told("file", told)


def _open_and_close(files: FileLocations, location: str, size: int) -> None:
    os.close(files.open(location, size=size))

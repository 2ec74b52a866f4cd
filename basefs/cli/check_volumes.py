"""Checks of volume-linking: Cinder, os-brick, a volume behind an image. Without them images are downloaded."""

from collections.abc import Callable

import trio
from oslo_config.cfg import ConfigOpts

from basefs.cli.findings import Finding, error, ok, warning
from basefs.config import Settings
from basefs.errors import BasefsError, ConfigError, NoVolumeError
from basefs.sources.access import GlanceAccess, open_glance
from basefs.sources.locations import GlanceLocations
from basefs.sources.metadata import GlanceMetadata
from basefs.volumes.access import open_cinder
from basefs.volumes.base import ImageFacts
from basefs.volumes.brick import Brick
from basefs.volumes.cinder import Cinder
from basefs.volumes.links import CinderVolumeLinks

DEADLINE_S = 60.0
IMAGES_MAX = 20
"""So many images are asked for their volume, at most."""
_DOWNLOADED = "images are downloaded"


def check_volumes(conf: ConfigOpts, settings: Settings) -> list[Finding]:
    """Everything about volumes, in at most about DEADLINE_S seconds."""
    if settings.template_image_handler == "downloading":
        return [ok("volumes", f"template_image_handler = downloading: {_DOWNLOADED}")]
    trouble = error if settings.template_image_handler == "volume-linking" else warning
    try:
        cinder, access = open_cinder(conf), open_glance(conf, threads_max=1)
    except ConfigError as exc:
        # Nobody who has no Cinder has to say so.
        return [(error if trouble is error else ok)("volumes", f"{exc}: {_DOWNLOADED}")]
    return trio.run(_check_volumes, cinder, access, settings, trouble)


async def _check_volumes(
    cinder: Cinder, access: GlanceAccess, settings: Settings, trouble: Callable[[str, str], Finding]
) -> list[Finding]:
    findings: list[Finding] = []
    with trio.move_on_after(DEADLINE_S) as limit:
        async with trio.open_nursery() as nursery:
            brick = Brick(
                nursery=nursery,
                helpers_max=1,
                lock_path=settings.volume_linking.lock_path,
                is_multipath=settings.volume_linking.multipath,
            )
            links = CinderVolumeLinks(cinder, GlanceLocations(access).locations, settings.volume_linking, brick)
            findings.append(await _os_brick(brick, settings, trouble))
            findings += await _cinder(cinder, trouble)
            if findings[-1].status == "ok":
                findings.append(await _an_image(links, access, trouble))
            nursery.cancel_scope.cancel()
    access.close()
    if limit.cancelled_caught:
        findings.append(trouble("volumes", f"no answer within {DEADLINE_S:g} s: {_DOWNLOADED}"))
    return findings


async def _os_brick(brick: Brick, settings: Settings, trouble: Callable[[str, str], Finding]) -> Finding:
    host = settings.volume_linking.host
    try:
        async with brick.helper() as helper:
            properties = await helper.properties(host=host, towards="localhost")
    except BasefsError as exc:
        return trouble("os-brick", f"{exc}: {_DOWNLOADED}. Is os-brick installed beside basefs?")
    ways = [name for key, name in (("initiator", "iSCSI"), ("wwpns", "FC"), ("nqn", "NVMe-oF")) if properties.get(key)]
    return ok("os-brick", f"host {host}; storage networks that it finds tools for: {', '.join(ways) or 'none'}")


async def _cinder(cinder: Cinder, trouble: Callable[[str, str], Finding]) -> list[Finding]:
    try:
        roles = await cinder.roles()
        clones = await cinder.volumes_by(metadata={"basefs_host": "no host has this name"})
    except BasefsError as exc:
        advice = "check [cinder], and that its user has the role member in the project of the volumes, or is admin"
        return [trouble("cinder", f"{exc}: {_DOWNLOADED}; {advice}")]
    assert not clones
    shown = f"; our roles: {', '.join(roles)}" if roles else ""
    if roles and not {"admin", "member"} & set(roles):
        advice = "it takes member in the project of the volumes, or admin, to attach"
        return [trouble("cinder", f"answers{shown}: {_DOWNLOADED}; {advice}")]
    return [ok("cinder", f"answers{shown}")]


async def _an_image(links: CinderVolumeLinks, access: GlanceAccess, trouble: Callable[[str, str], Finding]) -> Finding:
    """Look for the volume of some images, until one has one."""
    reason = "there is no active image"
    try:
        images = [one for one in await GlanceMetadata(access).list_images() if one.get("status") == "active"]
        for image in images[:IMAGES_MAX]:
            facts = ImageFacts(image_id=str(image["id"]), size=int(image.get("size") or 0))
            try:
                found = await links.find(facts)
            except NoVolumeError as exc:
                reason = f"image {facts.image_id}: {exc}"
                continue
            how = "attached" if found.is_multiattach else "cloned (its type is not multiattach)"
            return ok("volumes", f"image {facts.image_id}: volume {found.volume_id} is {how} when the image is used")
    except BasefsError as exc:
        return trouble("volumes", f"{exc}: {_DOWNLOADED}")
    advice = "Glance tells locations to admin and the role service, or with show_multiple_locations"
    looked_at = f"none found behind {min(len(images), IMAGES_MAX)} of {len(images)} images"
    return ok("volumes", f"{looked_at}: {_DOWNLOADED} ({reason}; {advice})")

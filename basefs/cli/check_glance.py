"""Checks of Glance: reachable, who we are there, how many images we see, whether ranges are honoured."""

from collections.abc import Mapping
from typing import Any

import trio
from oslo_config.cfg import ConfigOpts

from basefs.cli.check_tier import check_tier
from basefs.cli.findings import Finding, error, ok, warning
from basefs.errors import BasefsError, ConfigError, SourceForbiddenError
from basefs.sources.access import GlanceAccess, open_glance
from basefs.sources.glance import GlanceSource
from basefs.sources.metadata import GlanceMetadata

DEADLINE_S = 60.0
PROBE_BYTES = 64 * 1024


def check_glance(conf: ConfigOpts) -> list[Finding]:
    """Everything about Glance, in at most about DEADLINE_S seconds."""
    return trio.run(_check_glance, conf)


async def _check_glance(conf: ConfigOpts) -> list[Finding]:
    findings: list[Finding] = []
    try:
        access = open_glance(conf, threads_max=1)
    except ConfigError as exc:
        return [error("glance", str(exc))]
    try:
        with trio.move_on_after(DEADLINE_S) as limit:
            await _ask(conf, access, findings)
    finally:
        access.close()
    if limit.cancelled_caught:
        findings.append(error("glance", f"no answer within {DEADLINE_S:g} s: is it overloaded?"))
    return findings


async def _ask(conf: ConfigOpts, access: GlanceAccess, findings: list[Finding]) -> None:
    try:
        who = await access.identity()
    except SourceForbiddenError as exc:
        findings.append(error("glance identity", f"{exc}: check auth_type, user, project and password in [glance]"))
        return
    except BasefsError as exc:
        findings.append(error("glance identity", f"{exc}: check auth_url, endpoint_override, cafile and the network"))
        return
    as_whom = who.user_name or who.user_id or "nobody in particular"
    project = who.project_name or who.project_id or "no project that the plugin knows"
    roles = f", roles {', '.join(who.roles)}" if who.roles else ""
    findings.append(ok("glance identity", f"{who.auth_type}: {as_whom} in {project}{roles}, at {who.endpoint}"))
    try:
        images = await GlanceMetadata(access).list_images()
    except SourceForbiddenError as exc:
        findings.append(error("glance", f"{exc}: the user may not list images; give it a role in its project"))
        return
    except BasefsError as exc:
        findings.append(error("glance", f"{exc}: check that Glance runs and can be reached from here"))
        return
    findings.append(ok("glance", f"answers; {len(images)} images visible to us"))
    findings += await _ranges(conf, access, images)


async def _ranges(conf: ConfigOpts, access: GlanceAccess, images: list[Mapping[str, Any]]) -> list[Finding]:
    """Ask for the first bytes of the smallest image that has more than the probe asks for."""
    active = [image for image in images if image.get("status") == "active" and image.get("size")]
    if not active:
        return [warning("ranges", "cannot be tried: there is no active image")]
    # A range that is the whole image proves nothing.
    image = min(active, key=lambda image: (image["size"] <= 1, image["size"]))
    size = int(image["size"])
    length = min(PROBE_BYTES, max(1, size // 2))
    try:
        probe = await GlanceSource(access, threads_max=1).probe(str(image["id"]), size=size, header_bytes=length)
    except SourceForbiddenError as exc:
        return [error("ranges", f"image {image['id']}: {exc}: the user may not download; it needs the role member")]
    except BasefsError as exc:
        return [error("ranges", f"image {image['id']}: {exc}: Glance lists images that it does not deliver")]
    if probe.kind == "ranged":
        honoured = ok("ranges", f"image {image['id']}: {probe.reason}")
        return [honoured, *await check_tier(conf, access, str(image["id"]), size, probe.header)]
    return [
        warning(
            "ranges",
            f"image {image['id']}: {probe.reason}; such images are fetched from their start to their end, so a read "
            "far inside waits for all before it",
        )
    ]

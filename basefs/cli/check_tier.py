"""Check of the cache tier in front of Glance: reachable, and the same bytes as Glance."""

import trio
from oslo_config.cfg import ConfigOpts

from basefs.cli.findings import Finding, error, ok, warning
from basefs.errors import BasefsError
from basefs.sources.access import GlanceAccess
from basefs.sources.tier_http import open_tier

DEADLINE_S = 20.0


async def check_tier(conf: ConfigOpts, access: GlanceAccess, image_id: str, size: int, start: bytes) -> list[Finding]:
    """Ask the tier for the image's first bytes, which Glance gave as `start`; nothing where there is no tier."""
    try:
        tier = open_tier(conf, access, threads_max=1)
    except BasefsError as exc:
        return [error("cache tier", str(exc))]
    if tier is None:
        return []
    came = bytearray()

    def keep(_offset: int, piece: memoryview) -> bool:
        came.extend(piece)
        return True

    try:
        with trio.move_on_after(DEADLINE_S) as limit:
            await tier.fetch_range(
                image_id, size=size, offset=0, length=len(start), piece_bytes=len(start), deliver=keep
            )
    except BasefsError as exc:
        return [warning("cache tier", f"{tier.url}: {exc}; images are read from Glance itself")]
    finally:
        tier.close()
    if limit.cancelled_caught:
        return [warning("cache tier", f"{tier.url}: no answer within {DEADLINE_S:g} s")]
    if came != start:
        return [error("cache tier", f"{tier.url}: other bytes of image {image_id} than Glance gives: look at its keys")]
    return [ok("cache tier", f"{tier.url}: the same bytes of image {image_id} as Glance gives")]

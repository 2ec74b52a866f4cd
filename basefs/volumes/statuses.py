"""Waiting for what Cinder does in its own time: there is no event, so it is asked again with growing pauses."""

import random
from collections.abc import Collection

import trio

from basefs import errors
from basefs.core.retry import backoff_s
from basefs.volumes.cinder import Cinder, Volume

PAUSE_BASE_S = 0.1
"""A clone on copy-on-write storage takes 0.3 s, a deletion 0.2 (measured)."""
PAUSE_CAP_S = 5.0


class GrowingPauses:
    """Pauses between tries: 0.1 s, then longer and longer ones, up to 5 s."""

    def __init__(self) -> None:
        self._attempt = 0

    async def pause(self) -> None:
        """Wait for the next try."""
        self._attempt += 1
        jitter = random.random()  # noqa: S311  spreads hosts, protects nothing
        await trio.sleep(backoff_s(self._attempt, base_s=PAUSE_BASE_S, cap_s=PAUSE_CAP_S, jitter=jitter))


async def wait_for_status(cinder: Cinder, volume_id: str, wanted: Collection[str]) -> Volume:
    """The volume, once it has one of the statuses. Waits without end for one that is under way.

    Raises:
        VolumeError: it went to an error status, or is gone, or Cinder cannot be asked.
    """
    pauses = GrowingPauses()
    while True:
        volume = await cinder.volume(volume_id)
        if volume.status in wanted:
            return volume
        if volume.status.startswith("error"):
            raise errors.VolumeError(f"volume {volume_id} has the status {volume.status}")
        await pauses.pause()


async def wait_until_gone(cinder: Cinder, volume_id: str) -> None:
    """Return when Cinder does not know the volume any more.

    Raises:
        VolumeError: its deletion failed, or Cinder cannot be asked.
    """
    try:
        await wait_for_status(cinder, volume_id, ())
    except errors.VolumeGoneError:
        return

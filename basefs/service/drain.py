"""`basefs drain`: everything in use becomes a file of the lower directory, so that basefs can leave the node."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from basefs import errors
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.control.api import PROGRESS_INTERVAL_S
from basefs.fuse.attributes import TIMEOUT_S
from basefs.handlers.graduation import Graduator
from basefs.handlers.uses import ImageUses

NAMES_KEPT_S = TIMEOUT_S + 0.1
"""The kernel may resolve a name to the image so long after it became a file: a utime of nova would be lost on it."""
LOOK_WAIT_S = 30.0
"""A look at the overlays of 1,000 instances takes 0.1 s; of NFS that hangs it takes for ever."""


@dataclass(slots=True)
class _Work:
    """One image's way into the lower directory."""

    state: str = "completing"
    error: errors.BasefsError | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)


class Drain:
    """Completes and graduates images in use, one after the other. `complete(entry)` brings and verifies all of one."""

    def __init__(
        self,
        catalog: Catalog,
        uses: ImageUses,
        graduator: Graduator,
        nursery: trio.Nursery,
        *,
        complete: Callable[[ImageEntry], Awaitable[None]],
    ) -> None:
        self._catalog = catalog
        self._uses = uses
        self._graduator = graduator
        self._nursery = nursery
        self._complete = complete

    async def run(self) -> AsyncGenerator[dict[str, Any], None]:
        """See `ServiceView.drain`."""
        if not self._graduator.is_on:
            raise errors.ControlError(
                "[basefs] graduate is false, so no image becomes a file of the lower directory: set it, `basefs "
                "upgrade`, and drain again"
            )
        await self._see_overlays()
        seen: set[int] = set()
        # What comes into use meanwhile, too: a guest that is booted now would lose its disk as well.
        while entries := [e for e in self._catalog.entries() if e.number not in seen and self._uses.why_in_use(e)]:
            for entry in entries:
                seen.add(entry.number)
                work = _Work()
                self._nursery.start_soon(self._graduate, entry, work)
                try:
                    while not work.done.is_set():
                        yield self._progress(entry, work)
                        with trio.move_on_after(PROGRESS_INTERVAL_S):
                            await work.done.wait()
                finally:
                    work.scope.cancel()
                yield self._progress(entry, work)
            await self._see_overlays()
        await trio.sleep(NAMES_KEPT_S if seen else 0)
        yield {"state": "ended"}

    async def _see_overlays(self) -> None:
        with trio.move_on_after(LOOK_WAIT_S):
            if await self._uses.overlays.see_all():
                return
        raise errors.ControlError(
            "not all overlays under instances_path can be seen, so it is not known which images are in use; see the log"
        )

    async def _graduate(self, entry: ImageEntry, work: _Work) -> None:
        """Ends with the image; cancelled when nobody waits for it any more, or with the service."""
        try:
            with work.scope:
                if not await self._graduator.is_lower(entry):
                    await self._complete(entry)
                    work.state = "graduating"
                    await self._graduator.graduate(entry)
                work.state = "graduated"
        except errors.BasefsError as exc:
            work.state, work.error = "failed", exc
        finally:
            work.done.set()

    def _progress(self, entry: ImageEntry, work: _Work) -> dict[str, Any]:
        return {
            "image_id": entry.image_id,
            "base_name": entry.base_name,
            "size": entry.size,
            "cached_bytes": entry.size if work.state in ("graduating", "graduated") else entry.local.cached_bytes,
            "in_use": "; ".join(self._uses.why_in_use(entry)),
            "state": work.state,
            "error": None if work.error is None else str(work.error),
        }

"""What Glance told of images' locations: asked once for each image, and known from an earlier server until then.

Keys that Glance's stores write into locations are dropped here: credentials come from the configuration only. Owned by
the trio loop.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from basefs import errors
from basefs.concurrency.single_flight import SingleFlight
from basefs.core.store_location import without_keys

log = logging.getLogger(__name__)

NONE_AGAIN_S = 600.0
"""So long that Glance tells no location of an image is remembered: an operator may allow it to meanwhile."""
FAILED_AGAIN_S = 10.0
"""So long a failed question is not made again; reads go to Glance meanwhile."""
REFRESH_PAUSE_S = 10.0
"""Between two questions that stores ask for by saying that an object is gone."""
ANSWER_LIMIT_S = 5.0
"""Who reads waits so long for the answer; the question goes on."""
IMAGES_MAX = 10_000
LOCATIONS_MAX = 16
LOCATION_CHARS_MAX = 4096


@dataclass(slots=True, kw_only=True, repr=False, eq=False)
class _Known:
    locations: tuple[str, ...]
    asked_at: float
    ask_at: float


class KnownLocations:
    """`of` gives the locations of an image; `ask(image_id)` asks Glance and raises our errors.

    `kept(image_id)` are those that a server before this one read from.
    """

    def __init__(
        self,
        ask: Callable[[str], Awaitable[Sequence[str]]],
        nursery: trio.Nursery,
        *,
        kept: Callable[[str], tuple[str, ...]],
    ) -> None:
        self._ask = ask
        self._kept = kept
        self._nursery = nursery
        self._flights: SingleFlight[str, None] = SingleFlight(nursery)
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def now(self, image_id: str) -> tuple[str, ...]:
        """What is known without asking."""
        known = self._known.get(image_id)
        return () if known is None else known.locations

    async def of(self, image_id: str) -> tuple[str, ...]:
        """URLs in Glance's order, as far as they are known within ANSWER_LIMIT_S. Never fails.

        Those that are asked for again, and those that were kept, are the answer meanwhile.

        Cancellation: ends this wait only.
        """
        known = self._known.get(image_id) or self._recalled(image_id)
        if known is not None and trio.current_time() < known.ask_at:
            self._known.move_to_end(image_id)
        elif known is not None and known.locations:
            known.ask_at = math.inf
            self._nursery.start_soon(self._question, image_id)
        else:
            with trio.move_on_after(ANSWER_LIMIT_S):
                await self._question(image_id)
        return self.now(image_id)

    def _recalled(self, image_id: str) -> _Known | None:
        """What was kept of the image, to be asked for at once; None if nothing was."""
        kept, now = self._kept(image_id), trio.current_time()
        if not kept:
            return None
        self._known[image_id] = _Known(locations=kept, asked_at=now, ask_at=now)
        return self._known[image_id]

    def refresh(self, image_id: str) -> None:
        """A store has not what these say: ask again when they are wanted next."""
        known = self._known.get(image_id)
        if known is not None:
            known.ask_at = min(known.ask_at, known.asked_at + REFRESH_PAUSE_S)

    async def _question(self, image_id: str) -> None:
        """Ends when the flight does."""
        with suppress(errors.BasefsError):  # a bug, which was logged, and is no reason to read nothing
            await self._flights.run(image_id, lambda: self._fly(image_id))

    async def _fly(self, image_id: str) -> None:
        """Runs as a flight: one question for an image at a time."""
        now, locations = trio.current_time(), self.now(image_id)
        try:
            told = await self._ask(image_id)
        except (errors.ImageNotFoundError, errors.SourceForbiddenError) as exc:
            log.debug("locations of image %s: %s", image_id, exc)
            locations, again_s = (), NONE_AGAIN_S
        except errors.SourceError as exc:
            # What was told before may be as good as ever.
            log.debug("locations of image %s: %s", image_id, exc)
            again_s = FAILED_AGAIN_S
        else:
            usable = dict.fromkeys(without_keys(one) for one in told if len(one) <= LOCATION_CHARS_MAX)
            locations = tuple(usable)[:LOCATIONS_MAX]
            again_s = math.inf if locations else NONE_AGAIN_S
        self._known[image_id] = _Known(locations=locations, asked_at=now, ask_at=now + again_s)
        self._known.move_to_end(image_id)
        if len(self._known) > IMAGES_MAX:
            self._known.popitem(last=False)

"""What the evictor finds in the cache, and in which order it goes.

Images not in use; of those, the ones that come as a stream last and as a whole; then images that are open or behind an
overlay; then pinned ones. Never: what is in use and could not be fetched again. Within a rank the oldest chunks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from basefs.catalog.records import ImageEntry

UNUSED, UNUSED_STREAM, IN_USE, PINNED = 0, 1, 2, 3


class EvictableImage(Protocol):
    """A prepared image; `cache.image_fetcher.ImageFetcher`."""

    entry: ImageEntry

    @property
    def is_busy(self) -> bool:
        """Whether a transfer is under way or a reader is inside."""
        ...

    def ages(self) -> list[tuple[int, int]]:
        """The ages that chunks have, oldest first, and their bytes."""
        ...

    def sweep(self) -> bool:
        """Every chunk is one sweep older; whether any was used since the last sweep."""
        ...

    async def evict(self, age: int, bytes_max: int) -> int:
        """Drop chunks at least `age` old until their blocks were at least `bytes_max`; how many chunks that were."""
        ...


class CacheContents(Protocol):
    """What there is to evict; the handler."""

    def prepared(self) -> list[EvictableImage]:
        """The images that are open here or were lately."""
        ...

    def entries(self) -> Iterable[ImageEntry]:
        """Every image that is known."""
        ...

    def allocated(self, entry: ImageEntry) -> int:
        """What the image's files hold of the disk."""
        ...

    def why_in_use(self, entry: ImageEntry) -> list[str]:
        """Why the image is in use, in an operator's words; empty when it is not."""
        ...

    async def learn_uses(self) -> None:
        """Have `why_in_use` be of the last seconds."""
        ...

    async def prepare(self, entry: ImageEntry) -> EvictableImage:
        """Prepare an image whose chunks are to be evicted one by one.

        Raises:
            BasefsError: it cannot be.
        """
        ...

    async def drop(self, entry: ImageEntry) -> int:
        """Drop all of an image that nobody has open; how many image bytes that were.

        Raises:
            BasefsError: it was not dropped.
        """
        ...


def rank_of(entry: ImageEntry, *, is_in_use: bool) -> int | None:
    """When the image's turn comes: lower goes earlier, None never goes.

    A stream brings one chunk at the price of the whole image. What Glance has no more, or does not give, would be an
    I/O error to a guest.
    """
    is_streamed = entry.local.source_kind == "streamed"
    if is_in_use and (is_streamed or entry.is_gone or entry.record.status != "active"):
        return None
    if entry.local.pinned:
        return PINNED
    if is_in_use:
        return IN_USE
    return UNUSED_STREAM if is_streamed else UNUSED


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """Chunks of one image and age; `image` is None where it is not prepared."""

    rank: int
    age: int
    used_at_ns: int
    entry: ImageEntry
    image: EvictableImage | None
    allocated: int

    @property
    def order(self) -> tuple[int, int, int, int]:
        """What sorts victims: the lowest goes first."""
        return self.rank, -self.age, self.used_at_ns, self.entry.number


def victims_of(
    contents: CacheContents, age_of: Callable[[int | None], int], *, rank_max: int, spare: int | None
) -> list[Victim]:
    """What may go, first what goes first: O(images). Not the image with the number `spare`."""
    prepared = {image.entry.number: image for image in contents.prepared()}
    victims = []
    for entry in contents.entries():
        allocated = contents.allocated(entry)
        if not allocated or entry.number == spare:
            continue
        rank = rank_of(entry, is_in_use=bool(contents.why_in_use(entry)))
        if rank is None or rank > rank_max:
            continue
        image = prepared.get(entry.number)
        used_at_ns = entry.local.last_used_ns or 0
        ages = image.ages() if image is not None else [(age_of(entry.local.last_used_ns), allocated)]
        victims += [
            Victim(rank=rank, age=age, used_at_ns=used_at_ns, entry=entry, image=image,
                    allocated=min(length, allocated))
            for age, length in ages
        ]  # fmt: skip
    return sorted(victims, key=lambda victim: victim.order)

"""What the server offers to the commands: the Protocol its service implements, and the routes' names."""

from collections.abc import AsyncGenerator
from typing import Any, Protocol

API_PREFIX = "/v1"
PROGRESS_INTERVAL_S = 0.25
"""About how often `warm` tells its progress."""
MAP_CELLS_MAX = 16384
"""The most cells of a map that are given; an image of 1 TiB has 16 million chunks."""


class ServiceView(Protocol):
    """The service as the control socket shows it. Everything runs in the service's trio loop.

    `ref` is an image id, a base name or a unique image name. Every method may raise a BasefsError, which becomes
    the answer: ImageNotFoundError, AmbiguousImageError, ImageBusyError, ImageRefusedError, SourceError, …

    Results hold JSON values only, and nothing secret.
    """

    def status(self) -> dict[str, Any]:
        """What `basefs status` shows.

        At least `mountpoint`, `state`, `keeper_pid`, `server_pid`, `images`,
        `fetched_bytes`, `fetch_requests`, `cache_bytes`, `glance_reachable`.
        """
        ...

    async def wait_known(self) -> None:
        """Return when images can be found: a node that was never mounted waits for Glance's list, some seconds."""
        ...

    def images(self) -> list[dict[str, Any]]:
        """Every image of the catalog, as `image` describes one."""
        ...

    def image(self, ref: str) -> dict[str, Any]:
        """One image.

        At least `id`, `name`, `base_name`, `disk_format`, `view`, `size`, `cached_bytes`,
        `fetched_bytes`, `state`, `handler`, `source`, `open_handles`, `refused_reason`.
        """
        ...

    def warm(self, ref: str) -> AsyncGenerator[dict[str, Any], None]:
        """Fetch what is missing while the caller iterates; closing the iterator gives up the wish.

        Yields about every PROGRESS_INTERVAL_S `image_id`, `base_name`, `cached_bytes`, `size`, `fetched_bytes`,
        `state`; the last one has the state `complete` or `linked`, or `failed` and an `error`.
        """
        ...

    async def start_warm(self, ref: str) -> dict[str, Any]:
        """Begin to fetch what is missing, and go on whatever becomes of the caller; progress as `warm` yields it."""
        ...

    def verify(self, ref: str | None) -> AsyncGenerator[dict[str, Any], None]:
        """Check what is here of the image, or of all images (None), on the disk, while the caller iterates.

        Yields about every PROGRESS_INTERVAL_S `image_id`, `size`, `cached_bytes`, `checked_bytes`, `damaged_chunks`,
        `refetched_chunks`, `error`, `state`; of each image the last one has the state `checked`, or `failed`.
        """
        ...

    def drain(self) -> AsyncGenerator[dict[str, Any], None]:
        """Make every image in use a file of the lower directory while the caller iterates.

        Yields about every PROGRESS_INTERVAL_S `image_id`, `base_name`, `size`, `cached_bytes`, `in_use`, `error`,
        `state`; of each image the last one has the state `graduated`, or `failed`. The very last one has nothing but
        the state `ended`: without it not every image was seen to.

        Raises:
            ControlError: images do not graduate here, or it is not known which are in use.
        """
        ...

    async def image_map(self, ref: str, *, cells_max: int) -> dict[str, Any]:
        """Where the stored bytes of the image are, in at most `cells_max` cells, 1 <= cells_max <= MAP_CELLS_MAX.

        `image_id`, `name`, `base_name`, `state`, `note` (what an operator should know of it, or None), `taken_at` (Unix
        time), `size`, `chunk_bytes`, `cell_bytes`; `present_bytes`, `zero_bytes` (here, and zeros), `fetching_bytes`,
        `missing_bytes`; `runs`: equal cells from byte 0 on, each `cells` (how many), and the bytes of one of them:
        `present_bytes`, `zero_bytes`, `fetching_bytes`. The last cell is what is left of the size.
        """
        ...

    async def evict(self, ref: str) -> dict[str, Any]:
        """Drop the image's local bytes: `evicted_bytes`.

        Raises:
            ImageBusyError: The image is open or pinned.
        """
        ...

    async def detach(self, ref: str, *, force: bool) -> dict[str, Any]:
        """Detach the image's volume: `image_id`, `volume_id` (the one that was attached). `force`: also in use.

        Raises:
            ImageBusyError: The image is in use.
            ControlError: It is not linked, or not detached yet.
        """
        ...

    def pin(self, ref: str, *, pinned: bool) -> dict[str, Any]:
        """Keep what is here of the image, or no longer: `image_id`, `pinned`."""
        ...

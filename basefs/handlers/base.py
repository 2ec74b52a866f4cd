"""How a base image is prepared: the base class of the nova blueprint, `init`, `fetch_image`, `remove_image`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from basefs.cache.reader_table import ReaderTable, Share
from basefs.catalog.records import ImageEntry
from basefs.core.link_record import LinkRecord

LinkState = Literal["none", "finding", "linking", "reopening", "linked", "refused", "broken", "detaching"]
"""Where an image stands between Glance and its volume: `handlers/links.py`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """What is told of an image's link; `reason`: why it is refused or broken. No secret in it."""

    state: LinkState
    reason: str | None
    record: LinkRecord | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a reader waits, and whether it also waits through a refusal (a guest does)."""

    deadline_s: float
    is_guest: bool


class PreparedImage(Protocol):
    """An image whose bytes can be read; what is not here comes meanwhile."""

    @property
    def size(self) -> int:
        """Bytes shown."""
        ...

    hit: Callable[[int, int], memoryview | bytes | None]
    """`hit(offset, size)`: what is shown there, up to the end, if it can be had at once; else None.

    The answer is valid until the next await. Never raises.
    """

    def share(self, table: ReaderTable, offset: int, size: int) -> Share | None:
        """What reader processes serve hits of the image with, now those of `[offset, offset + size)`, too.

        None where they cannot.
        """
        ...

    async def read(self, offset: int, size: int, patience: Patience) -> bytes | memoryview:
        """What is shown of `[offset, offset + size)`: all of it up to the end, or an error. Valid until the next await.

        Raises:
            BasefsError: why the bytes did not come within the patience.
        """
        ...


class TemplateImageHandler(ABC):
    """One way to prepare base images (`[basefs] template_image_handler`)."""

    name: str

    @abstractmethod
    async def init(self) -> None:
        """Prepare again after a restart what was prepared before."""

    @abstractmethod
    async def fetch_image(self, entry: ImageEntry) -> PreparedImage:
        """The image, ready to be read. Does no slow work: bytes come when they are read.

        Raises:
            BasefsError: it cannot be prepared now.
        """

    @abstractmethod
    def opened(self, entry: ImageEntry, image: PreparedImage) -> None:
        """Somebody opened `image`: it stays prepared until `released` was called as often."""

    @abstractmethod
    async def released(self, entry: ImageEntry) -> None:
        """One handle fewer. Never fails, also for a handle that an earlier server gave out."""

    @abstractmethod
    def restore_opens(self, handles: Mapping[int, int]) -> None:
        """Begin with these handles by image number: those that the servers before this one gave out."""

    @abstractmethod
    def open_handles(self, entry: ImageEntry) -> int:
        """Handles on the image, of this and of earlier servers."""

    @abstractmethod
    async def is_lazy_again(self, entry: ImageEntry) -> bool:
        """True once after the lower file that the image had become is gone: it is a lazy image again from here.

        Raises:
            LowerFileError: the lower directory does not say.
        """

    @abstractmethod
    async def remove_image(self, entry: ImageEntry) -> int:
        """Drop what is here of an image that nobody has open; how many bytes that were. Glance keeps its own."""

    @abstractmethod
    async def keep_header(self, entry: ImageEntry, header: bytes) -> None:
        """Keep the image's first bytes, which the checks have read."""

    @abstractmethod
    def warm(self, entry: ImageEntry) -> None:
        """Have the whole image brought in the background (nova's pre-cache call), by this server or a later one."""

    @abstractmethod
    def is_warming(self, entry: ImageEntry) -> bool:
        """Whether the whole image is being brought on request."""

    @abstractmethod
    def is_hydrating(self, entry: ImageEntry) -> bool:
        """Whether the whole image is being brought because it is in use."""

    def link(self, entry: ImageEntry) -> LinkReport | None:  # noqa: ARG002 (only volume-linking has links)
        """How the image is linked to its volume; None where this handler links none."""
        return None

    def is_placed(self, entry: ImageEntry) -> bool:  # noqa: ARG002 (only file-placing reads files in place)
        """Whether the image is read from Glance's own file."""
        return False

    @abstractmethod
    async def close(self) -> None:
        """Give everything back; what was prepared can be prepared again by the next server."""

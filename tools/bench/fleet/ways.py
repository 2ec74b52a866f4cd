"""The ways by which an image's bytes come to the nodes, and what Glance and others sent on each."""

import abc
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tools.bench.fleet.network import SITE_ADDRESS
from tools.bench.peers.base import usage_of
from tools.cache_tier import CacheTier
from tools.rig import Rig

StoreName = Literal["fs", "ceph"]
"""The stores of the rig's Glance that have the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was sent so far of one image's bytes, and the processor time that it took.

    `asked` are requests of one byte, by which a tier asks whether somebody may have the image.
    """

    glance_bytes: int
    glance_requests: int
    asked: int
    glance_cpu_s: float
    other_bytes: int = 0
    other_requests: int = 0
    other_cpu_s: float = 0.0

    def since(self, earlier: "Sent") -> "Sent":
        """The difference."""
        return Sent(**{name: getattr(self, name) - getattr(earlier, name) for name in Sent.__slots__})


class Way(abc.ABC):
    """One way, of nodes whose Glance is `rig`. `store` is where that keeps the image."""

    name: ClassVar[str]
    store: ClassVar[StoreName] = "fs"

    def __init__(self, rig: Rig, image_id: str) -> None:
        self.rig = rig
        self.image_id = image_id

    @contextlib.contextmanager
    def running(self, directory: Path) -> Iterator[dict[str, object]]:  # noqa: ARG002 (most need a place)
        """What it needs besides Glance runs, with nothing cached; yields the options of a mount."""
        yield {}

    def sent(self) -> Sent:
        """So far."""
        answered = [one for one in self.rig.requests(f"{self.image_id}/file") if one.method == "GET"]
        return Sent(
            glance_bytes=sum(one.length for one in answered if one.status in (200, 206)),
            glance_requests=len(answered),
            asked=sum(1 for one in answered if one.range == "bytes=0-0"),
            glance_cpu_s=usage_of(group(self.rig.pids["glance"])).cpu_s,
        )


class GlanceRanges(Way):
    """Each node asks Glance."""

    name = "Glance ranges"


class Tier(Way):
    """All nodes ask the nginx that is shipped, which asks Glance for what it does not have, and if they may."""

    name = "Glance + tier"
    authorised_s10: ClassVar[bool] = False

    @contextlib.contextmanager
    def running(self, directory: Path) -> Iterator[dict[str, object]]:
        with CacheTier(
            directory, self.rig.glance_url, host=SITE_ADDRESS, authorised_s10=self.authorised_s10
        ) as self._tier:
            yield {"glance.cache_endpoint": self._tier.url}

    def sent(self) -> Sent:
        glance = super().sent()
        served = self._tier.served()
        return Sent(
            glance_bytes=glance.glance_bytes,
            glance_requests=glance.glance_requests,
            asked=glance.asked,
            glance_cpu_s=glance.glance_cpu_s,
            other_bytes=sum(one.sent_bytes for one in served),
            other_requests=len(served),
            other_cpu_s=usage_of(group(self._tier.pid)).cpu_s,
        )


class TierAuthorised(Tier):
    """The same, where Glance's yes to a token holds for 10 s."""

    name = "Glance + tier, 10 s"
    authorised_s10 = True


class Rbd(Way):
    """Each node reads from the Ceph that Glance keeps the image in."""

    name = "rbd"
    store: ClassVar[StoreName] = "ceph"

    @contextlib.contextmanager
    def running(self, directory: Path) -> Iterator[dict[str, object]]:  # noqa: ARG002  it runs beside Glance
        yield {"rbd.pools": "images", "rbd.ceph_conf": self.rig.ceph.conf_path}

    def sent(self) -> Sent:
        glance = super().sent()
        reads, sent_bytes = self.rig.ceph.served()
        return Sent(
            glance_bytes=glance.glance_bytes,
            glance_requests=glance.glance_requests,
            asked=glance.asked,
            glance_cpu_s=glance.glance_cpu_s,
            other_bytes=sent_bytes,
            other_requests=reads,
            other_cpu_s=usage_of(group(self.rig.pids["osd.0"])).cpu_s,
        )


WAYS: tuple[type[Way], ...] = (GlanceRanges, Tier, TierAuthorised, Rbd)


def group(leader: int) -> list[int]:
    """The processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(") ")[2].split()[2]) == leader:
                    found.append(int(entry.name))
    return found

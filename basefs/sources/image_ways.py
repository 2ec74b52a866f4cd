"""The ways to one image's bytes behind Glance, in the operator's order, and why others are none."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from basefs.core.location_kinds import SourceName, endpoint_of, kind_of
from basefs.core.safe_text import safe_text
from basefs.core.store_location import may_be_kept
from basefs.sources.store import Store
from basefs.sources.ways import StoreEndpoint, Way

OTHERS_READ: Mapping[SourceName, str] = {
    "volume": "read by volume-linking, see `link`",
    "file": "used in place, see `file`",
}
"""Locations that are no store's: what is done about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A location that is no way, and why. The reason has no secret in it."""

    name: SourceName
    reason: str


@dataclass(slots=True, kw_only=True, eq=False)
class ImageWays:
    """One image's."""

    image_id: str
    locations: tuple[str, ...] = ()
    ways: list[Way] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    last: SourceName | None = None
    """By which source bytes came last."""

    def good_at(self) -> float:
        """When a way is good, or is to be tried: -inf now, inf never."""
        return min((way.good_at for way in self.ways), default=float("inf"))

    def to_keep(self) -> tuple[str, ...]:
        """The locations that lead somewhere, and have no secret in them: for the server that follows."""
        used = {way.location for way in self.ways}
        return tuple(one for one in self.locations if may_be_kept(one) and (one in used or kind_of(one) == "file"))

    def report(self) -> list[dict[str, Any]]:
        """Each way and each refusal, as JSON values. Holds no secret."""
        return [
            *(
                {
                    "source": way.name,
                    "endpoint": way.endpoint.host,
                    "state": _state(way),
                    "reason": way.error or way.endpoint.error,
                    "received_bytes": way.delivered_bytes,
                }
                for way in self.ways
            ),
            *(
                {"source": one.name, "endpoint": "", "state": "refused", "reason": one.reason, "received_bytes": 0}
                for one in self.refusals
            ),
        ]


def _state(way: Way) -> str:
    if way.is_good:
        return "read" if way.delivered_bytes else "ready"
    return "resting"


def pairs(
    image_id: str, locations: Sequence[str], stores: Mapping[SourceName, Store], order: Sequence[SourceName]
) -> Iterator[tuple[Store, str] | Refusal]:
    """Each location with its store, in the operator's order, or why it is refused."""
    by_rank = sorted(locations, key=lambda one: _rank(kind_of(one), order))  # stable: Glance's order in a store
    for location in by_rank:
        kind = kind_of(location)
        if kind is None or kind == "glance":
            continue
        if kind in OTHERS_READ:
            yield Refusal(name=kind, reason=OTHERS_READ[kind])
        elif kind not in order:
            yield Refusal(name=kind, reason="source_order leaves it out")
        elif (store := stores.get(kind)) is None:
            yield Refusal(name=kind, reason="it is not configured")
        elif (reason := store.refusal(image_id, location)) is not None:
            yield Refusal(name=kind, reason=safe_text(reason))
        else:
            yield store, location


def late_last(ways: Sequence[Way | None], span: range) -> list[Way | None]:
    """The ways to these bytes; where they are being fetched already comes after all others but Glance at the end.

    Bytes are asked for twice only when the first request is late (`cache/ranged_transfer`): so the second one is made
    to another store, where there is one. Not to Glance, which for most stores answers no ranges.
    """
    late = [way for way in ways if way is not None and way.is_fetching(span)]
    others = [way for way in ways if way not in late]
    end = len(others) - (others[-1:] == [None])
    return [*others[:end], *late, *others[end:]]


def _rank(kind: SourceName | None, order: Sequence[SourceName]) -> int:
    return order.index(kind) if kind is not None and kind in order else len(order)


class StoreEndpoints:
    """The endpoints that images were found at; all images at one share it."""

    def __init__(self) -> None:
        self._endpoints: dict[tuple[SourceName, str], StoreEndpoint] = {}

    def of(self, name: SourceName, location: str) -> StoreEndpoint:
        """That of a location of the store of this name."""
        host = endpoint_of(location)
        if (name, host) not in self._endpoints:
            self._endpoints[name, host] = StoreEndpoint(name, host)
        return self._endpoints[name, host]

    def report(self, stores: Mapping[SourceName, Store]) -> list[dict[str, Any]]:
        """How each stands, and which of the `stores` were not read, as JSON values. No secret."""
        used = {one.name for one in self._endpoints.values()}
        answers = {True: "answers", False: "resting"}
        return [
            *(_standing(one.name, one.host, answers[one.rest.is_good], one.error) for one in self._endpoints.values()),
            *(
                _standing(name, "", "unused" if store.missing is None else "missing", store.missing)
                for name, store in stores.items()
                if name not in used
            ),
        ]


def _standing(name: SourceName, host: str, state: str, error: str | None) -> dict[str, Any]:
    return {"source": name, "endpoint": host, "state": state, "error": error}

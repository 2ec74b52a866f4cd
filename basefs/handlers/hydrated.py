"""What the hydrator finds on the node (`cache.hydrator.HydratedImages`)."""

from collections.abc import Callable, Collection

from basefs.catalog.records import ImageEntry
from basefs.handlers.gate import ServableGate
from basefs.handlers.uses import ImageUses


class NodeImages:
    """`entries` gives every image of the catalog."""

    def __init__(
        self,
        entries: Callable[[], Collection[ImageEntry]],
        uses: ImageUses,
        gate: ServableGate,
        *,
        check_deadline_s: float,
        is_linked: Callable[[ImageEntry], bool],
    ) -> None:
        self._uses = uses
        self._gate = gate
        self._check_deadline_s = check_deadline_s
        self.entries = entries
        self.is_linked = is_linked

    def why_in_use(self, entry: ImageEntry) -> list[str]:
        """See `HydratedImages`."""
        return self._uses.why_in_use(entry)

    async def check(self, entry: ImageEntry) -> None:
        """See `HydratedImages`."""
        await self._gate.let_through(entry, deadline_s=self._check_deadline_s, for_warming=True)

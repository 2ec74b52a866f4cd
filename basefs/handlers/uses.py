"""Why images are in use: open, pinned, wanted, or behind an overlay. The evictor leaves those for last."""

from basefs.cache.overlays import OverlayWatch
from basefs.catalog.records import ImageEntry
from basefs.handlers.base import TemplateImageHandler


class ImageUses:
    """Asks the handler for opens and the watch for overlays."""

    def __init__(self, handler: TemplateImageHandler, overlays: OverlayWatch) -> None:
        self._handler = handler
        self.overlays = overlays

    def has_open(self, entry: ImageEntry) -> bool:
        """Whether somebody has the image open."""
        return self._handler.open_handles(entry) > 0

    def why_in_use(self, entry: ImageEntry) -> list[str]:
        """The reasons, in an operator's words; empty when there is none."""
        reasons = []
        handles = self._handler.open_handles(entry)
        if handles:
            reasons.append(f"open ({handles} handles)" if handles > 1 else "open")
        if entry.local.pinned:
            reasons.append("pinned")
        if entry.local.is_wanted:
            reasons.append("wanted by nova's pre-cache")
        reasons += [f"base of {overlay}" for overlay in self.overlays.users(entry.base_name)]
        if not self.overlays.is_known and entry.local.used_at_ns is not None:
            reasons.append("used here, and its overlays are not known yet")
        return reasons

"""What operators are told of an image: the same words in `status.json`, xattrs, and the commands."""

from typing import Any, Literal

from basefs.catalog.records import ImageEntry
from basefs.handlers.base import TemplateImageHandler
from basefs.handlers.gate import ServableGate
from basefs.handlers.uses import ImageUses

ImageState = Literal[
    "quarantined", "refused", "refetching", "warming", "hydrating", "verified", "complete", "unchecked", "partial",
    "cold", "graduated", "linking", "linked", "in place",
]  # fmt: skip


def image_state(entry: ImageEntry, gate: ServableGate, handler: TemplateImageHandler) -> ImageState:
    """One word for where the image stands on this node.

    `cold`: nothing here but perhaps the header; `partial`: some was read; `complete`: every byte is here;
    `verified`: and they have the hash that Glance tells; `refetching`, `quarantined`: they had another;
    `graduated`: it became a file of the lower directory, nova's own; `linked`: it is read from its volume, which is
    being attached while it is `linking`; `in place`: it is read from Glance's own file.
    """
    if entry.local.is_graduated:
        return "graduated"
    whole = entry.local.whole
    if whole == "quarantined":
        return "quarantined"
    verdict = gate.verdict(entry)
    if verdict.state == "refused" and not handler.is_warming(entry):
        return "refused"
    if whole == "refetching":
        return "refetching"
    if handler.is_warming(entry):
        return "warming"
    link = handler.link(entry)
    if link is not None and link.state in ("linked", "finding", "linking", "reopening"):
        return "linked" if link.state == "linked" else "linking"
    if handler.is_placed(entry):
        return "in place"
    if handler.is_hydrating(entry) or entry.local.is_wanted:
        return "hydrating"
    if entry.size and entry.local.cached_bytes == entry.size:
        return "verified" if whole == "verified" else "complete"
    if verdict.state == "unchecked":
        return "unchecked"
    return "partial" if entry.local.used_at_ns is not None else "cold"


def map_note(entry: ImageEntry, *, refused_reason: str | None, state: ImageState) -> str | None:
    """What a map of the image's chunks does not tell, in an operator's words."""
    if refused_reason is not None:
        return f"refused, so nova downloads it by itself: {refused_reason}"
    if entry.local.is_graduated:
        return f"graduated: all of it is the lower file {entry.base_name}; the map is of the cache"
    if state == "linked":
        return "linked: it is read from its volume; the map is of the cache"
    if state == "in place":
        return "in place: it is read from Glance's own file; the map is of the cache"
    if entry.local.whole == "quarantined":
        return "quarantined: as a whole it has not the hash that Glance tells"
    return None


def link_report(entry: ImageEntry, handler: TemplateImageHandler) -> dict[str, Any]:
    """By which handler the image is read now, and what there is of a link to its volume, as JSON values."""
    link = handler.link(entry)
    record = None if link is None else link.record
    return {
        "handler": "volume-linking" if link is not None and link.state == "linked" else "downloading",
        "link": None if link is None else link.state,
        "link_reason": None if link is None else link.reason,
        "volume_id": None if record is None else record.volume_id,
        "clone_id": None if record is None else record.clone_id,
        "attachment_id": None if record is None else record.attachment_id,
        "connector": None if record is None else record.connector,
        "device": None if record is None else record.device,
    }


def image_report(
    entry: ImageEntry, gate: ServableGate, handler: TemplateImageHandler, uses: ImageUses, view: str
) -> dict[str, Any]:
    """Everything about one image, as JSON values. Holds no secret."""
    record, local = entry.record, entry.local
    return {
        "id": entry.image_id,
        "name": record.name,
        "base_name": entry.base_name,
        "status": "deleted" if entry.is_gone else record.status,
        "visibility": record.visibility,
        "disk_format": record.disk_format,
        "view": view,
        "size": record.size,
        "shown_size": None if record.size is None else entry.shown_size,
        "cached_bytes": local.cached_bytes,
        "fetched_bytes": local.fetched_bytes,
        "state": image_state(entry, gate, handler),
        "whole": local.whole,
        **link_report(entry, handler),
        "source": local.source_kind,
        "source_reason": local.source_reason,
        "pinned": local.pinned,
        "in_use": "; ".join(uses.why_in_use(entry)),
        "open_handles": handler.open_handles(entry),
        "refused_reason": gate.refused_reason(entry),
    }

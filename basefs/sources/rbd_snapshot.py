"""A snapshot of an RBD image as librbd has it open, and where it has bytes at all."""

from dataclasses import dataclass
from typing import Any

from basefs import errors
from basefs.core.store_location import RbdLocation
from basefs.sources.ceph_cluster import CephLibrary, Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot as librbd has it open. `part_bytes` neighbouring bytes are in one object.

    `objects`: a byte for each `part_bytes`, 0 where the snapshot has no object; None where there is no map of them.
    """

    image: Any
    pool: Any
    size: int
    header: str
    snapshot_id: int
    part_bytes: int
    objects: bytes | None

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the bytes are known to be zeros."""
        if self.objects is None:
            return False
        return not any(self.objects[offset // self.part_bytes : (offset + length - 1) // self.part_bytes + 1])


def open_snapshot(library: CephLibrary, cluster: Cluster, location: RbdLocation) -> Snapshot:
    """The snapshot at `location`, read-only (thread). Raises the library's errors."""
    rbd = library.rbd
    pool = cluster.pool(location.pool)
    image = rbd.Image(pool, location.image, snapshot=location.snapshot, read_only=True)
    try:
        _check_format(image, location.image)
        is_striped = image.stripe_count() > 1
        part_bytes = image.stripe_unit() if is_striped else image.stat()["obj_size"]
        return Snapshot(
            image=image,
            pool=pool,
            size=image.size(),
            header=f"rbd_header.{image.id()}",
            snapshot_id=image.snap_get_id(location.snapshot),
            part_bytes=part_bytes,
            objects=None if is_striped else _objects_of(rbd, image, part_bytes),
        )
    except BaseException:
        image.close()
        raise


def _check_format(image: Any, name: str) -> None:  # noqa: ANN401  has no types
    if image.old_format():
        raise errors.SourceForbiddenError(f"rbd image {name}: it has RBD's first format, which Glance never wrote")


def _objects_of(rbd: Any, image: Any, object_bytes: int) -> bytes | None:  # noqa: ANN401  have no types
    """See `Snapshot.objects`. Without fast-diff librbd would ask for each object: a thousand questions for 8 GiB."""
    has_map = image.features() & rbd.RBD_FEATURE_FAST_DIFF
    if not has_map or image.flags() & (rbd.RBD_FLAG_FAST_DIFF_INVALID | rbd.RBD_FLAG_OBJECT_MAP_INVALID):
        return None
    size = image.size()
    found = bytearray(-(-size // object_bytes))

    def saw(offset: int, length: int, exists: bool) -> None:
        if exists and length:
            for index in range(offset // object_bytes, (offset + length - 1) // object_bytes + 1):
                found[index] = 1

    image.diff_iterate(0, size, None, saw, include_parent=True, whole_object=True)
    return bytes(found)

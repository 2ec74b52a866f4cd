"""Which volume has the bytes of an image, and whether it may be linked."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from basefs import errors
from basefs.core.link_record import FoundBy
from basefs.core.safe_text import safe_text
from basefs.core.volume_location import volume_id_of
from basefs.volumes.base import FoundVolume, ImageFacts
from basefs.volumes.cinder import GIB, Cinder, Volume

Locations = Callable[[str], Awaitable[Sequence[str]]]
"""The URLs of an image's data, as far as Glance tells them to us."""
IMAGE_ID_KEY = "glance_image_id"
IMAGE_SIZE_KEY = "image_size"
"""Metadata that glance_store's cinder driver gives its volumes (_drivers/cinder/store.py: add)."""


class VolumeFinder:
    """By the operator's map, else by Glance's locations, else (if asked to) by the metadata of volumes."""

    def __init__(
        self,
        cinder: Cinder,
        locations: Locations,
        *,
        image_volume_map: Mapping[str, str],
        use_volume_metadata: bool,
    ) -> None:
        self._cinder = cinder
        self._locations = locations
        self._map = image_volume_map
        self._use_metadata = use_volume_metadata

    async def find(self, image: ImageFacts) -> FoundVolume:
        """See `VolumeLinks.find`."""
        volume_id = self._map.get(image.image_id)
        found_by: FoundBy = "map"
        if volume_id is None:
            volume_id, found_by = await self._by_location(image), "location"
        if volume_id is None and self._use_metadata:
            volume_id, found_by = await self._by_metadata(image), "metadata"
        if volume_id is None:
            raise errors.NoVolumeError("Glance tells no location of it in Cinder, and it is in no image_volume_map")
        try:
            volume = await self._cinder.volume(volume_id)
        except errors.VolumeGoneError as exc:
            raise errors.NoVolumeError(
                f"{exc}: the user of [cinder] must be admin, or in the project that has the volume"
            ) from exc
        reason = unfit_for(volume, image)
        if reason is not None:
            raise errors.NoVolumeError(f"volume {volume_id} {reason}")
        return FoundVolume(volume_id=volume_id, found_by=found_by, is_multiattach=volume.is_multiattach)

    async def _by_location(self, image: ImageFacts) -> str | None:
        try:
            locations = await self._locations(image.image_id)
        except errors.ImageNotFoundError as exc:
            raise errors.NoVolumeError(f"{exc}") from exc
        except errors.SourceError as exc:
            raise errors.VolumeError(f"locations of image {image.image_id}: {exc}") from exc
        return next(filter(None, map(volume_id_of, locations)), None)

    async def _by_metadata(self, image: ImageFacts) -> str | None:
        found = await self._cinder.volumes_by(metadata={IMAGE_ID_KEY: image.image_id})
        # Cinder's copies of volumes keep metadata; more than one cannot be told apart.
        fitting = [one.volume_id for one in found if one.metadata.get(IMAGE_ID_KEY) == image.image_id]
        if len(fitting) > 1:
            raise errors.NoVolumeError(f"{len(fitting)} volumes have the metadata {IMAGE_ID_KEY} of it")
        return fitting[0] if fitting else None


def unfit_for(volume: Volume, image: ImageFacts) -> str | None:
    """Why the volume cannot be linked for the image, as the end of a sentence; None if nothing speaks against it.

    Raises:
        VolumeError: its status says nothing now.
    """
    if volume.is_encrypted:
        return "is encrypted"
    if volume.size < image.size:
        return f"has {volume.size // GIB} GiB, less than the image's {image.size} bytes"
    size = volume.metadata.get(IMAGE_SIZE_KEY)
    if size is not None and size != str(image.size):
        return f"says {IMAGE_SIZE_KEY} = {safe_text(size)}, and the image has {image.size} bytes"
    if volume.status.startswith("error") or volume.status in ("deleting", "maintenance", "creating"):
        raise errors.VolumeError(f"volume {volume.volume_id} has the status {volume.status}")
    return None

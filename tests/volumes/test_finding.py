"""Which volume is an image's, and which may not be linked."""

import dataclasses

import pytest

from basefs import errors
from basefs.volumes.base import FoundVolume, ImageFacts
from basefs.volumes.cinder import GIB, Volume
from basefs.volumes.finding import VolumeFinder

IMAGE = ImageFacts(image_id="11111111-1111-4111-8111-111111111111", size=1000)
FIRST, SECOND = "6d54cb90-a5d1-40d8-9cb2-c6adf43a02af", "7d54cb90-a5d1-40d8-9cb2-c6adf43a02af"
GOOD = Volume(
    volume_id=FIRST,
    status="in-use",
    size=GIB,
    is_multiattach=True,
    is_encrypted=False,
    metadata={"glance_image_id": IMAGE.image_id, "image_size": "1000"},
    attached=(),
)


class OneCinder:
    def __init__(self, *volumes: Volume) -> None:
        self.volumes = {one.volume_id: one for one in volumes}

    async def volume(self, volume_id: str) -> Volume:
        if volume_id not in self.volumes:
            raise errors.VolumeGoneError(f"volume {volume_id}: Cinder does not know it")
        return self.volumes[volume_id]

    async def volumes_by(self, **filters: object) -> list[Volume]:
        return list(self.volumes.values())


def finder_of(*volumes, locations=(), volume_map=None, use_metadata=False):
    async def told(image_id: str):
        if isinstance(locations, Exception):
            raise locations
        return locations

    return VolumeFinder(OneCinder(*volumes), told, image_volume_map=volume_map or {}, use_volume_metadata=use_metadata)


async def test_the_first_location_in_cinder_counts():
    finder = finder_of(GOOD, locations=("file:///x", f"cinder://fast/{FIRST}", f"cinder://{SECOND}"), use_metadata=True)
    assert await finder.find(IMAGE) == FoundVolume(volume_id=FIRST, found_by="location", is_multiattach=True)


async def test_the_map_goes_before_glance():
    mapped = dataclasses.replace(GOOD, volume_id=SECOND, is_multiattach=False, metadata={})
    finder = finder_of(GOOD, mapped, locations=(f"cinder://{FIRST}",), volume_map={IMAGE.image_id: SECOND})
    assert await finder.find(IMAGE) == FoundVolume(volume_id=SECOND, found_by="map", is_multiattach=False)


async def test_metadata_counts_only_where_it_is_asked_for_and_names_one_volume():
    assert (await finder_of(GOOD, use_metadata=True).find(IMAGE)).found_by == "metadata"
    for finder, text in (
        (finder_of(GOOD), "no location of it in Cinder"),
        (finder_of(GOOD, dataclasses.replace(GOOD, volume_id=SECOND), use_metadata=True), "2 volumes have"),
        (finder_of(dataclasses.replace(GOOD, metadata={}), use_metadata=True), "no location of it in Cinder"),
    ):
        with pytest.raises(errors.NoVolumeError, match=text):
            await finder.find(IMAGE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_encrypted": True}, "is encrypted"),
        ({"size": 0}, "has 0 GiB, less than the image's 1000 bytes"),
        ({"metadata": {"image_size": "999"}}, "says image_size = 999, and the image has 1000 bytes"),
        ({"metadata": {"image_size": "many"}}, "says image_size = many"),
    ],
)
async def test_a_volume_that_does_not_fit_is_refused_with_the_reason(change, reason):
    finder = finder_of(dataclasses.replace(GOOD, **change), locations=(f"cinder://{FIRST}",))
    with pytest.raises(errors.NoVolumeError, match=f"volume {FIRST} {reason}"):
        await finder.find(IMAGE)


@pytest.mark.parametrize("status", ["error", "error_deleting", "deleting", "creating", "maintenance"])
async def test_a_status_that_may_pass_is_no_refusal(status):
    finder = finder_of(dataclasses.replace(GOOD, status=status), locations=(f"cinder://{FIRST}",))
    with pytest.raises(errors.VolumeError, match=status) as caught:
        await finder.find(IMAGE)
    assert not isinstance(caught.value, errors.NoVolumeError)


async def test_a_volume_that_cinder_does_not_show_us_is_refused_with_what_to_do():
    with pytest.raises(errors.NoVolumeError, match=r"must be admin, or in the project that has the volume"):
        await finder_of(locations=(f"cinder://{FIRST}",)).find(IMAGE)


async def test_glance_away_is_no_refusal():
    finder = finder_of(GOOD, locations=errors.SourceUnavailableError("Glance is away"))
    with pytest.raises(errors.VolumeError, match="Glance is away") as caught:
        await finder.find(IMAGE)
    assert not isinstance(caught.value, errors.NoVolumeError)
    with pytest.raises(errors.NoVolumeError):
        await finder_of(GOOD, locations=errors.ImageNotFoundError("no such image")).find(IMAGE)

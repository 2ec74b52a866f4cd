"""What a host without a usable [cinder] has."""

import os

import pytest

from basefs import errors
from basefs.config.loading import load_settings
from basefs.core.link_record import LinkRecord
from basefs.volumes.base import FoundVolume, ImageFacts, VolumeLinks
from basefs.volumes.connection import sealed_connection
from basefs.volumes.links import open_volume_links
from tests.contract.volume_worlds import Notes

IMAGE = ImageFacts(image_id="image", size=1)
FOUND = FoundVolume(volume_id="volume", found_by="location", is_multiattach=True)
RECORD = LinkRecord(stage="attached", volume_id="volume", found_by="location", attachment_id="attachment")


async def test_without_a_cinder_no_image_has_a_volume_and_what_is_noted_stays_noted(tmp_path, nursery):
    (tmp_path / "base").mkdir()
    (tmp_path / "basefs.conf").write_text(
        f"[basefs]\nmountpoint = {tmp_path}/base\ncache_dir = {tmp_path}/cache\ncontrol_socket = {tmp_path}/s\n"
        "[glance]\nauth_type = none\nendpoint_override = http://127.0.0.1:1\n"
    )
    conf, settings = load_settings([str(tmp_path / "basefs.conf")])
    note = Notes()
    links: VolumeLinks = open_volume_links(conf, settings.volume_linking, lambda _: None, nursery=nursery)
    with pytest.raises(errors.NoVolumeError, match=r"\[cinder\] endpoint_override is not set"):
        await links.find(IMAGE)
    for call in (
        lambda: links.attach(IMAGE, FOUND, note),
        lambda: links.reopen(IMAGE, RECORD, note),
        lambda: links.detach(RECORD, None, note),
    ):
        with pytest.raises(errors.VolumeError, match="endpoint_override is not set"):
            await call()
    await links.remove_unknown({"image": RECORD})
    assert note.records == []
    (tmp_path / "device").write_bytes(b"bytes")
    adopted = await links.adopt(RECORD, os.open(tmp_path / "device", os.O_RDONLY), sealed_connection({}))
    assert adopted.bytes.read(0, 5) == b"bytes"
    adopted.bytes.close()
    os.close(adopted.connection_fd)

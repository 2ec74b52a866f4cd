"""The way back: what is left connected for others' sake, and what cannot be undone any more."""

import os
import subprocess

import pytest

from basefs import errors
from basefs.core.link_record import LinkRecord
from basefs.volumes import helper
from basefs.volumes.cinder import Attachment
from basefs.volumes.removing import Remover
from tests.contract.volume_worlds import Notes

INFO = {"driver_volume_type": "iscsi"}
ATTACHED = LinkRecord(
    stage="attached", volume_id="v", found_by="location", attachment_id="a", connector="iscsi", device="/dev/sdx"
)


class Connector:
    """os-brick's, as far as the helper uses it."""

    def __init__(self) -> None:
        self.disconnected: list[object] = []

    def disconnect_volume(self, connection_info, device_info) -> None:
        self.disconnected.append(device_info)


@pytest.fixture
def device(tmp_path, monkeypatch):
    monkeypatch.setattr(helper, "USERS_LOOKS", 0)
    (tmp_path / "backing").write_bytes(bytes(1 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", tmp_path / "backing"], capture_output=True, text=True, check=True
    ).stdout.strip()
    yield made
    subprocess.run(["losetup", "-d", made], check=True)


@pytest.mark.parametrize("may_be_shared", [True, False])
def test_a_device_that_nobody_has_open_is_taken_away(device, may_be_shared):
    connector = Connector()
    info = {"path": device}
    assert helper._disconnect(connector, INFO, info, may_be_shared=may_be_shared) == {"disconnected": True}
    assert connector.disconnected == [info]


def test_a_device_that_others_use_too_stays_for_them(device, tmp_path):
    connector = Connector()
    os.symlink(device, tmp_path / "by-path")
    opened = os.open(device, os.O_RDONLY)
    answer = helper._disconnect(connector, INFO, {"path": str(tmp_path / "by-path")}, may_be_shared=True)
    os.close(opened)
    assert answer == {"disconnected": False, "users": [f"process {os.getpid()}"]}
    assert not connector.disconnected


def test_a_device_that_is_ours_alone_and_open_is_not_taken_away(device):
    opened = os.open(device, os.O_RDONLY)
    with pytest.raises(errors.VolumeError, match=f"still open by process {os.getpid()}"):
        helper._disconnect(Connector(), INFO, {"path": device}, may_be_shared=False)
    os.close(opened)


def test_the_answers_of_a_helper_say_what_went_wrong(tmp_path):
    assert "error" in helper._answer({"do": "properties"}, None)[0]
    assert "error" in helper._answer({"do": "connect", "multipath": False}, None)[0]


class GoneCinder:
    """Somebody deleted the attachment."""

    async def attachments_of(self, volume_id):
        return [Attachment(attachment_id="of-nova", status="attached", server_id="server")]

    async def connection_info(self, attachment_id):
        raise errors.VolumeGoneError("gone")

    delete_attachment = connection_info


async def test_a_device_that_cannot_be_disconnected_any_more_is_told_once(brick, expected_warnings):
    expected_warnings(r"attachment a is gone from Cinder, .* disconnect /dev/sdx: look whether")
    note = Notes()
    await Remover(GoneCinder(), brick, host="node").remove(ATTACHED, None, note)
    assert [record and record.stage for record in note.records] == ["detaching", None]

"""What `basefs doctor` says of volume-linking."""

import dataclasses
import re

import pytest

from basefs.cli.check_volumes import check_volumes
from basefs.config.loading import load_settings


def findings_of(directory, conf_lines, handler="auto"):
    (directory / "base").mkdir(exist_ok=True)
    path = directory / "basefs.conf"
    path.write_text(
        f"[basefs]\nmountpoint = {directory}/base\ncache_dir = {directory}/cache\ncontrol_socket = {directory}/s\n"
        f"{conf_lines}"
    )
    conf, settings = load_settings([str(path)])
    found = check_volumes(conf, dataclasses.replace(settings, template_image_handler=handler))
    return {one.check: (one.status, one.detail) for one in found}


@pytest.mark.glance
@pytest.mark.cinder
def test_a_volume_behind_an_image_is_found(tmp_path, cinder_rig):
    (tmp_path / "image").write_bytes(b"bytes")
    cinder_rig.place_cinder(tmp_path / "image", "for the doctor", multiattach=False)
    found = findings_of(tmp_path, cinder_rig.conf_lines())
    assert {status for status, _ in found.values()} == {"ok"}, found
    assert "host " in found["os-brick"][1]
    assert re.search(r"^image \S+: volume \S+ is (attached|cloned .*) when the image is used$", found["volumes"][1])


GLANCE = "[glance]\nauth_type = none\nendpoint_override = http://127.0.0.1:1\n"


@pytest.mark.parametrize(("handler", "status"), [("auto", "ok"), ("volume-linking", "error")])
def test_who_has_no_cinder_need_not_say_so_unless_volumes_are_all_there_is(tmp_path, handler, status):
    found = findings_of(tmp_path, GLANCE, handler)
    assert found["volumes"][0] == status
    assert "endpoint_override is not set" in found["volumes"][1]
    assert "images are downloaded" in found["volumes"][1]


def test_who_wants_no_volumes_is_not_asked_for_a_cinder(tmp_path):
    assert findings_of(tmp_path, GLANCE, "downloading")["volumes"][0] == "ok"


@pytest.mark.parametrize(("handler", "status"), [("auto", "warning"), ("volume-linking", "error")])
def test_a_cinder_that_is_away_is_told_with_what_to_do(tmp_path, handler, status):
    found = findings_of(tmp_path, f"{GLANCE}[cinder]\nendpoint_override = http://127.0.0.1:1/v3\n", handler)
    assert found["cinder"][0] == status
    assert "role member" in found["cinder"][1]
    assert found["os-brick"][0] == "ok"

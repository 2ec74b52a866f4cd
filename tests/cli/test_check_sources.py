"""What `basefs doctor` says of the stores behind Glance."""

import pytest

from basefs.cli.check_sources import check_sources
from basefs.config.loading import load_settings
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.fakes.memory_web import MemoryWeb

DATA = b"bytes" * 1000
GLANCE_AWAY = "[glance]\nauth_type = none\nendpoint_override = http://127.0.0.1:1\n"


@pytest.fixture
def glance():
    with MisbehavingFront() as running:
        yield running


@pytest.fixture
def web():
    with MisbehavingFront() as running:
        running.extra_routes["/"] = MemoryWeb()
        yield running


def findings_of(directory, conf_lines, tail=""):
    (directory / "base").mkdir(exist_ok=True)
    path = directory / "basefs.conf"
    path.write_text(
        f"[basefs]\nmountpoint = {directory}/base\ncache_dir = {directory}/cache\ncontrol_socket = {directory}/s\n"
        f"{conf_lines}{tail}"
    )
    return {one.check: (one.status, one.detail) for one in check_sources(*load_settings([str(path)]))}


def allow(web):
    return f"[http_location]\nallowed_hosts = {web.url.partition('//')[2]}\n"


def test_without_a_store_nobody_is_asked(tmp_path):
    found = findings_of(tmp_path, GLANCE_AWAY)
    assert found == {"sources": ("ok", "images are read from Glance: no store behind it is configured")}


def test_a_ceph_conf_that_cannot_be_read_is_named_also_where_no_image_is_in_ceph(tmp_path):
    found = findings_of(tmp_path, GLANCE_AWAY, f"[rbd]\npools = images\nceph_conf = {tmp_path}/none.conf\n")
    assert list(found) == ["rbd"]
    assert found["rbd"][0] == "warning"
    assert f"[rbd] ceph_conf = {tmp_path}/none.conf: No such file or directory" in found["rbd"][1]


def test_a_store_and_a_file_that_an_image_can_be_read_from_are_named(tmp_path, glance, web):
    image = glance.glance.add(DATA)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / image).write_bytes(DATA)
    location = web.url + web.extra_routes["/"].put(f"/{image}", DATA)
    glance.glance.locations[image] = [location, f"file://{tmp_path}/images/{image}"]
    found = findings_of(
        tmp_path, glance.conf_lines(), f"{allow(web)}[file_location]\ndirectories = {tmp_path}/images\n"
    )
    host = web.url.partition("//")[2]
    assert found == {
        "http": ("ok", f"{host} answers; image {image} can be read there"),
        "file": ("ok", f"image {image} can be read in place"),
    }


def test_a_store_that_is_away_or_refuses_is_told_with_what_follows(tmp_path, glance, web):
    image = glance.glance.add(DATA)
    glance.glance.locations[image] = [f"{web.url}/{image}"]
    web.on().respond(answers.status(403))
    status, detail = findings_of(tmp_path, glance.conf_lines(), allow(web))["http"]
    assert (status, "answered 403" in detail, "the last is Glance" in detail) == ("warning", True, True)
    glance.glance.locations[image] = [f"http://user:SECRET@127.0.0.1/{image}"]
    status, detail = findings_of(tmp_path, glance.conf_lines(), allow(web))["http"]
    assert (status, "holds a user or password" in detail, "SECRET" in detail) == ("warning", True, False)


def test_a_glance_that_tells_no_locations_is_told_with_what_to_do(tmp_path, glance, web):
    glance.glance.add(DATA)
    status, detail = findings_of(tmp_path, glance.conf_lines(), allow(web))["http"]
    assert (status, "role service" in detail) == ("warning", True)
    assert findings_of(tmp_path, GLANCE_AWAY, allow(web))["sources"][0] == "warning"


def test_an_option_that_is_wrong_is_an_error(tmp_path, glance):
    found = findings_of(tmp_path, glance.conf_lines(), "[http_location]\nallowed_hosts = http://x\n")
    assert found["sources"] == (
        "error", "[http_location] allowed_hosts: 'http://x' is no host, host:port or [IPv6 address]:port",
    )  # fmt: skip

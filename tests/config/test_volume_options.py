"""[cinder] and [volume_linking]: what is read, what is refused, whose credentials are used."""

import socket

import pytest

from basefs.config.volume_options import cinder_auth_section
from basefs.errors import ConfigError
from basefs.volumes.access import open_cinder

IMAGE, VOLUME = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-2222222222AB"
KEYSTONE = {"auth_type": "password", "auth_url": "http://127.0.0.1:1", "password": "x", "endpoint_override": None}


def linking(config_file, text: str):
    return config_file.load(tail=f"[volume_linking]\n{text}\n")[1].volume_linking


def test_without_the_section_nothing_must_be_configured(config_file):
    found = linking(config_file, "")
    assert (found.host, found.image_volume_map, found.use_volume_metadata) == (socket.gethostname(), {}, False)
    assert found.lock_path == config_file.directory / "cache" / "os-brick"


def test_the_map_has_pairs_of_ids_in_lower_case(config_file):
    assert linking(config_file, f"image_volume_map = {IMAGE}:{VOLUME}").image_volume_map == {IMAGE: VOLUME.lower()}


@pytest.mark.parametrize(
    ("line", "option"),
    [
        (f"image_volume_map = {IMAGE}:volume-1", "image_volume_map"),
        (f"image_volume_map = {IMAGE}", "image_volume_map"),
        ("host = two words", "host"),
        (f"host = {'h' * 151}", "host"),
        ("lock_path = locks", "lock_path"),
        ("attach_deadline_s = 0", "attach_deadline_s"),
        ("attach_deadline_s =", "attach_deadline_s"),
        ("attach_concurrency_max = 65", "attach_concurrency_max"),
        ("detach_idle = 3", "detach_idle"),
    ],
)
def test_a_bad_value_is_named_by_its_option(config_file, line, option):
    with pytest.raises(ConfigError, match=option):
        linking(config_file, line)


def test_cinder_uses_the_credentials_of_glance_unless_it_has_its_own(config_file):
    for tail in ("", "[cinder]\nauth_section = glance\n"):
        conf, _ = config_file.load(glance=KEYSTONE, tail=tail)
        assert cinder_auth_section(conf) == "glance"
    conf, _ = config_file.load(glance={"auth_type": None, "auth_section": "keys"}, tail=KEYS)
    assert cinder_auth_section(conf) == "keys"
    conf, _ = config_file.load(
        glance=KEYSTONE, tail="[cinder]\nauth_type = admin_token\ntoken = t\nendpoint_override = http://127.0.0.1:1\n"
    )
    assert cinder_auth_section(conf) == "cinder"
    open_cinder(conf)


KEYS = "[keys]\nauth_type = password\nauth_url = http://127.0.0.1:1\npassword = x\n"


def test_cinder_may_name_a_third_section(config_file):
    conf, _ = config_file.load(tail=f"[cinder]\nauth_section = keys\n{KEYS}")
    assert cinder_auth_section(conf) == "keys"
    with pytest.raises(ConfigError, match=r"\[nowhere\] auth_type is not set"):
        config_file.load(tail="[cinder]\nauth_section = nowhere\n")


def test_without_a_catalog_the_place_of_cinder_must_be_said(config_file):
    conf, _ = config_file.load()
    with pytest.raises(ConfigError, match=r"\[cinder\] endpoint_override is not set"):
        open_cinder(conf)


def test_a_value_of_cinder_is_never_shown(config_file):
    with pytest.raises(ConfigError) as caught:
        config_file.load(tail="[cinder]\nauth_type = password\npasword = hunter2\n")
    assert "hunter2" not in str(caught.value)
    assert "pasword" in str(caught.value)

"""[basefs] source_order, [http_location] and [file_location]: what is read, and what is refused."""

from pathlib import Path

import pytest

from basefs.config.source_options import SOURCE_NAMES
from basefs.core import location_kinds
from basefs.errors import ConfigError


def test_nothing_is_configured_by_default(config_file):
    found = config_file.load()[1]
    assert found.source_order == SOURCE_NAMES == ("volume", "rbd", "file", "s3", "swift", "http", "glance")
    assert found.http_location.allowed_hosts == ()
    assert found.file_location.directories == ()


def test_config_and_core_know_the_same_sources():
    assert set(SOURCE_NAMES) == set(location_kinds.SOURCE_NAMES)


def test_hosts_and_directories_are_lists(config_file):
    found = config_file.load(
        tail="[http_location]\nallowed_hosts = a.example, b.example:8080\n"
        "[file_location]\ndirectories = /var/lib/glance/images, /mnt/two\n"
    )[1]
    assert found.http_location.allowed_hosts == ("a.example", "b.example:8080")
    assert found.file_location.directories == (Path("/var/lib/glance/images"), Path("/mnt/two"))


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ("rbd, ceph", "there is no source 'ceph'; there are volume, rbd, file, s3, swift, http, glance"),
        ("rbd, glance, rbd", "names rbd more than once"),
        ("rbd, volume", "volume stands first or not at all"),
    ],
)
def test_an_order_that_is_none_is_named(config_file, order, why):
    with pytest.raises(ConfigError, match=f"source_order.*{why}"):
        config_file.settings(source_order=order)


def test_volume_linking_needs_the_volume_in_the_order(config_file):
    with pytest.raises(ConfigError, match="source_order leaves volume out"):
        config_file.settings(source_order="glance", template_image_handler="volume-linking")
    assert config_file.settings(source_order="glance").source_order == ("glance",)


@pytest.mark.parametrize("path", ["images", "/", "//", "/var/../etc", "/var/./x"])
def test_a_directory_is_an_absolute_path_below_the_root(config_file, path):
    with pytest.raises(ConfigError, match="directories"):
        config_file.load(tail=f"[file_location]\ndirectories = {path}\n")


def test_a_cafile_that_is_not_there_is_named(config_file):
    with pytest.raises(ConfigError, match="cafile = /no/such: No such file"):
        config_file.load(tail="[http_location]\ncafile = /no/such\n")

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basefs.config import Settings, find_config_files, load_settings
from basefs.config.options import BASEFS_OPTS
from basefs.config.source_options import FILE_OPTS, HTTP_OPTS, FileLocationSettings, HttpLocationSettings
from basefs.config.volume_options import VOLUME_LINKING_OPTS, VolumeLinkingSettings
from basefs.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_defaults_are_those_of_the_options(config_file):
    loaded = config_file.settings()
    for opt in BASEFS_OPTS:
        if opt.dest not in {"mountpoint", "cache_dir", "control_socket", "instances_path", "readers"}:
            is_list = isinstance(opt.default, list)
            assert getattr(loaded, opt.dest) == (tuple(opt.default) if is_list else opt.default)


def test_instances_path_is_the_parent_of_the_mount_point(config_file):
    assert config_file.settings().instances_path == config_file.directory
    assert config_file.settings(instances_path="/srv/nova").instances_path == Path("/srv/nova")


def test_settings_and_options_have_the_same_names():
    sections = {"trace_share", "volume_linking", "http_location", "file_location", "rbd", "s3", "swift"}
    assert {opt.dest for opt in BASEFS_OPTS} | sections == set(Settings.__slots__)
    assert {opt.dest for opt in VOLUME_LINKING_OPTS} == set(VolumeLinkingSettings.__slots__)
    assert {opt.dest for opt in HTTP_OPTS} == set(HttpLocationSettings.__slots__)
    assert {opt.dest for opt in FILE_OPTS} == set(FileLocationSettings.__slots__)


def test_paths_lose_links_and_dots(config_file):
    (config_file.directory / "link").symlink_to(config_file.directory / "base")
    loaded = config_file.settings(mountpoint=f"{config_file.directory}/x/../link/.")
    assert loaded.mountpoint == config_file.directory / "base"


def test_later_files_and_directories_win(config_file, tmp_path):
    first = config_file.write(basefs={"fetch_threads_max": 4, "max_background": 5})
    extra = tmp_path / "conf.d"
    extra.mkdir()
    (extra / "b.conf").write_text("[basefs]\nfetch_threads_max = 7\n")
    (extra / "a.conf").write_text("[basefs]\nfetch_threads_max = 6\n")
    (extra / "ignored.txt").write_text("[basefs]\nfetch_threads_max = 9\n")
    loaded = load_settings([first], [str(extra)])[1]
    assert (loaded.fetch_threads_max, loaded.max_background) == (7, 5)
    assert [Path(path).name for path in find_config_files([first], [str(extra)])] == ["basefs.conf", "a.conf", "b.conf"]


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("[basefs]\nmountpiont = /x\n", r"line 10: unknown key mountpiont in \[basefs\] \(did you mean mountpoint\?\)"),
        ("[glanse]\nx = 1\n", r"line 9: unknown section \[glanse\] \(did you mean glance\?\)"),
        ("[glance]\npasword = x\n", r"line 10: unknown key pasword in \[glance\]"),
        ("[DEFAULT]\ndebgu = true\n", r"line 10: unknown key debgu in \[DEFAULT\] \(did you mean debug\?\)"),
        ("[DEFAULT]\nconfig_file = /x\n", "unknown key config_file"),
        ("[glance]\nhunter 2 = x\n", r"unknown key \(not a name\)"),
    ],
)
def test_unknown_sections_and_keys_are_errors(config_file, tail, expected):
    path = config_file.write(tail=tail)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_settings([path])
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("chunk_bytes", "a lot"),
        ("chunk_bytes", "8192"),
        ("chunk_bytes", "8388608"),
        ("fetch_threads_max", "2"),
        ("fetch_threads_max", "65"),
        ("fetch_request_bytes_max", "1"),
        ("template_image_handler", "linking"),
        ("view", "qcow2"),
        ("verify_glance_signatures", "perhaps"),
        ("guest_io_deadline_s", "nan seconds"),
        ("max_background", "0"),
        ("max_background", ""),
        ("catalog_refresh_s", "nan"),
        ("cache_dir", "$nonsense"),
    ],
)
def test_a_bad_value_names_file_line_and_option(config_file, option, value):
    path = config_file.write(basefs={option: value})
    with pytest.raises(ConfigError) as caught:
        load_settings([path])
    assert f"{path}, line " in str(caught.value)
    assert f"[basefs] {option}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"chunk_bytes": 100_000}, "no power of two"),
        ({"chunk_bytes": 4194304, "fetch_request_bytes_max": 6291456}, "no multiple of chunk_bytes"),
        ({"read_ahead_bytes": 1000}, "no multiple of 4096"),
        ({"catalog_refresh_s": 10, "catalog_full_refresh_s": 5}, "is less than catalog_refresh_s"),
        ({"guest_io_deadline_s": 10, "other_io_deadline_s": 11}, "is more than guest_io_deadline_s"),
        ({"cache_dir": "{base}/cache"}, "cache_dir = .* lies on the mount point"),
        ({"cache_dir": "{base}"}, "cache_dir = .* lies on the mount point"),
        ({"cache_dir": "{base}/.."}, "mountpoint = .* lies in cache_dir"),
        ({"control_socket": "{base}/control.sock"}, "control_socket = .* lies on the mount point"),
        ({"control_socket": "/run/" + 100 * "x" + ".sock"}, "is longer than 100 bytes"),
        ({"instances_path": "{base}"}, "instances_path = .* lies on the mount point"),
        ({"mountpoint": "/"}, "root directory"),
        ({"mountpoint": "relative/base"}, "must be an absolute path"),
        ({"mountpoint": "{base}/none"}, "No such file or directory"),
        ({"mountpoint": "/etc/passwd"}, "is no directory"),
        ({"nova_user": ""}, "nova_user is empty"),
    ],
)
def test_options_that_contradict_each_other_are_refused(config_file, options, expected):
    base = str(config_file.directory / "base")
    with pytest.raises(ConfigError, match=expected):
        config_file.settings(**{name: str(value).replace("{base}", base) for name, value in options.items()})


def test_all_problems_are_told_at_once(config_file):
    with pytest.raises(ConfigError, match=r"chunk_bytes.*; .*read_ahead_bytes"):
        config_file.settings(chunk_bytes=100_000, read_ahead_bytes=7)


def test_a_missing_auth_type_says_what_to_set(config_file):
    with pytest.raises(ConfigError, match=r"\[glance\] auth_type is not set.*password"):
        config_file.load(glance={"auth_type": None})


def test_an_unknown_auth_type_has_a_suggestion(config_file):
    with pytest.raises(ConfigError, match=r"no such auth plugin; did you mean v3applicationcredential\?"):
        config_file.load(glance={"auth_type": "v3applicationcredentials"})


def test_auth_type_none_needs_an_endpoint(config_file):
    with pytest.raises(ConfigError, match="endpoint_override is not set"):
        config_file.load(glance={"endpoint_override": None})


def test_the_options_of_the_auth_plugin_are_known(config_file):
    conf, _ = config_file.load(
        glance={
            "auth_type": "password",
            "auth_url": "http://127.0.0.1:5000/v3",
            "username": "basefs",
            "password": "secret",
            "user_domain_name": "Default",
            "project_name": "service",
            "project_domain_name": "Default",
            "region_name": "RegionOne",
            "interface": "internal",
            "cafile": "/etc/ssl/ca.pem",
            "insecure": "true",
        }
    )
    assert conf.glance.username == "basefs"
    assert conf.glance.service_type == "image"


def test_application_credentials_are_known(config_file):
    conf, _ = config_file.load(
        glance={
            "auth_type": "v3applicationcredential",
            "auth_url": "http://127.0.0.1:5000/v3",
            "application_credential_id": "abc",
            "application_credential_secret": "secret",
        }
    )
    assert conf.glance.application_credential_id == "abc"


def test_a_plugin_s_missing_option_is_named(config_file):
    with pytest.raises(ConfigError, match=r"auth.url"):
        config_file.load(glance={"auth_type": "password", "username": "basefs"})


def test_interface_and_valid_interfaces_exclude_each_other(config_file):
    with pytest.raises(ConfigError, match="exclude each other"):
        config_file.load(glance={"interface": "internal", "valid_interfaces": "internal"})


def test_another_section_may_hold_the_credentials(config_file):
    path = config_file.write(
        glance={"auth_section": "service_user", "auth_type": None},
        tail="[service_user]\nauth_type = http_basic\nusername = basefs\npassword = secret\n",
    )
    conf, _ = load_settings([path])
    assert conf.service_user.username == "basefs"


def test_a_file_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_settings([str(tmp_path / "none.conf")])
    with pytest.raises(ConfigError, match="does not exist"):
        load_settings([], [str(tmp_path / "none.d")])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"mountpoint = /x\n", "line 1: a `key = value` before the first"),
        (b"[glance]\nsecret-word-alone\n", "line 2: neither a"),
        (b"[glance\n", "line 1: "),
        (b"[glance]\nuser = \xff\n", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_parsed_names_the_line_and_not_its_text(tmp_path, content, expected):
    path = tmp_path / "bad.conf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_settings([str(path)])
    assert "secret-word-alone" not in str(caught.value)


SECRETS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=6, max_size=20).filter(
    lambda text: text[0] not in "#;\"'" and "\n" not in text
)
KEYS = st.sampled_from(["password", "pasword", "Password", "pass word", "timeout", "insecure", "auth_type", "auth_url"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=KEYS, secret=SECRETS, separator=st.sampled_from([" = ", ": ", "=", " "]))
def test_no_error_ever_shows_a_value_of_the_glance_section(config_file, key, secret, separator):
    secret = f"Zq7{secret}"
    path = config_file.write(glance={"auth_type": "password", "auth_url": "http://127.0.0.1:1", "password": "x"})
    text = Path(path).read_text() + f"{key}{separator}{secret}\n"
    Path(path).write_text(text, encoding="utf-8")
    try:
        load_settings([path])
    except ConfigError as exc:
        assert secret not in str(exc)  # noqa: PT017


OPTION_VALUES = st.dictionaries(
    st.sampled_from([opt.dest for opt in BASEFS_OPTS]),
    st.one_of(
        st.integers(-10, 2**40).map(str),
        st.floats().map(str),
        st.sampled_from(["", "true", "/", "/tmp", "..", "$x", "raw", "auto", "65536", "\0", "/\0"]),
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=OPTION_VALUES)
def test_whatever_is_configured_gives_sound_settings_or_a_config_error(config_file, options):
    try:
        loaded = config_file.settings(**options)
    except ConfigError:
        return
    assert loaded.chunk_bytes.bit_count() == 1
    assert loaded.fetch_request_bytes_max % loaded.chunk_bytes == 0
    assert 0 < loaded.other_io_deadline_s <= loaded.guest_io_deadline_s
    assert 0 < loaded.catalog_refresh_s <= loaded.catalog_full_refresh_s
    assert all(getattr(loaded, name).is_absolute() for name in ("mountpoint", "cache_dir", "control_socket"))
    assert not loaded.cache_dir.is_relative_to(loaded.mountpoint)
    assert not loaded.mountpoint.is_relative_to(loaded.cache_dir)


def test_the_sample_is_what_the_generator_writes(tmp_path):
    generated = tmp_path / "sample"
    subprocess.run(
        [
            str(Path(sys.executable).with_name("oslo-config-generator")),
            "--config-file",
            str(ROOT / "etc/basefs/config-generator.conf"),
            "--output-file",
            str(generated),
        ],
        check=True,
        capture_output=True,
    )
    assert generated.read_text() == (ROOT / "etc/basefs/basefs.conf.sample").read_text()


def test_the_sample_has_no_path_of_a_machine():
    text = (ROOT / "etc/basefs/basefs.conf.sample").read_text()
    assert str(ROOT) not in text
    assert "/root" not in text

"""[rbd], [s3] and [swift]: nothing by default, what is needed, what is refused without a word about a key."""

import pytest

from basefs.config.store_options import RbdSettings, S3Settings, SwiftSettings
from basefs.errors import ConfigError
from tools.secrets_used import FAKE_PASSWORD

S3 = f"[s3]\nendpoint = https://s3.example/\nbuckets = glance, old-*\naccess_key = K\nsecret_key = {FAKE_PASSWORD}\n"


def test_no_store_is_configured_by_default(config_file):
    found = config_file.load()[1]
    assert (found.rbd, found.s3, found.swift) == (None, None, None)


def test_pools_turn_the_rbd_store_on(config_file):
    found = config_file.load(tail="[rbd]\npools = images, more\nuser = reader\n")[1].rbd
    assert found == RbdSettings(
        pools=("images", "more"), ceph_conf="/etc/ceph/ceph.conf", user="reader", connect_timeout_s=5, op_timeout_s=10
    )


def test_an_endpoint_turns_the_s3_store_on_and_its_secret_is_in_no_text(config_file):
    found = config_file.load(tail=S3)[1].s3
    assert isinstance(found, S3Settings)
    assert (found.endpoint, found.buckets, found.secret_key) == (
        "https://s3.example",
        ("glance", "old-*"),
        FAKE_PASSWORD,
    )
    assert FAKE_PASSWORD not in str(found)


def test_containers_turn_the_swift_store_on_with_the_user_of_glance_or_its_own(config_file):
    assert config_file.load(tail="[swift]\ncontainers = glance\n")[1].swift == SwiftSettings(containers=("glance",))
    own = f"auth_type = v1password\nauth_url = http://s/auth/v1.0\nusername = a:b\npassword = {FAKE_PASSWORD}\n"
    conf = config_file.load(tail=f"[swift]\ncontainers = glance\n{own}")[0]
    assert conf.swift.username == "a:b"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[rbd]\npools = a\nceph_conf = ceph.conf\n", "ceph_conf must be an absolute path"),
        ("[rbd]\npools = a\nuser = client.glance\n", "user"),
        ("[rbd]\npools = a\nop_timeout_s = 0\n", "op_timeout_s"),
        ("[s3]\nendpoint = https://s3.example\n", "buckets is not set"),
        (S3.replace("https://", "ftp://"), "endpoint"),
        (S3.replace("https://", f"https://K:{FAKE_PASSWORD}@"), "endpoint"),
        ("[swift]\ncontainers = a\nauth_type = nonsense\n", "no such auth plugin"),
        ("[swift]\ncontainer = a\n", "unknown key container"),
    ],
)
def test_what_is_not_usable_is_named_and_no_secret_is(config_file, text, problem):
    with pytest.raises(ConfigError, match=problem) as refused:
        config_file.load(tail=text)
    assert FAKE_PASSWORD not in str(refused.value)

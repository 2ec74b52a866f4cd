"""radosgw on the rig's Ceph: the S3 and the Swift API of a rig, and Glance's stores in them."""

import json
from typing import TYPE_CHECKING, Any

from tools.rig.identity import PASSWORD

if TYPE_CHECKING:
    from tools.rig.ceph import Ceph

S3_KEY, S3_SECRET = "RIGGLANCEKEY", PASSWORD + "-s3"
READER_KEY, READER_SECRET = "RIGREADERKEY", PASSWORD + "-s3-reader"
"""Of a user who may read Glance's bucket, and nothing else: what basefs is given."""
SWIFT_USER, SWIFT_SECRET = "rigglance:swift", PASSWORD + "-swift"
"""For auth_type = v1password. Glance itself and its containers are in Keystone's project `service`."""
BUCKET, CONTAINER = "glance-s3", "glance-swift"
"""Of one radosgw they share one namespace."""
LARGE_MIB = 8
"""Larger images are in S3 as a multipart upload. (Not in Swift: radosgw 16 does not answer to Glance's empty PUT of a
manifest; one that is put otherwise works.)"""

_CONF = """[client.rgw]
rgw data = {d}/rgw
rgw frontends = beast endpoint={host}:{port}
rgw enable usage log = false
rgw enable ops log = false
"""
_KEYSTONE = """rgw keystone url = {url}
rgw keystone api version = 3
rgw keystone admin user = glance
rgw keystone admin password = {password}
rgw keystone admin domain = Default
rgw keystone admin project = service
rgw keystone accepted roles = admin, member, service
rgw keystone implicit tenants = false
"""
_GLANCE_S3 = """[s3]
s3_store_host = {url}
s3_store_region_name = default
s3_store_access_key = {key}
s3_store_secret_key = {secret}
s3_store_bucket = {bucket}
s3_store_create_bucket_on_put = true
s3_store_bucket_url_format = path
s3_store_large_object_size = {large_mib}
s3_store_large_object_chunk_size = 5
"""
_GLANCE_SWIFT = """[swift]
default_swift_reference = ref1
swift_store_config_file = {d}/glance/swift.conf
swift_store_region = RegionOne
swift_store_container = {container}
swift_store_create_container_on_put = true
"""
SWIFT_REFERENCES = """[ref1]
user = service:glance
key = {password}
auth_address = {keystone_url}
user_domain_id = default
project_domain_id = default
"""


def url(host: str, port: int) -> str:
    """Return the endpoint of its S3 API."""
    return f"http://{host}:{port}"


def conf(directory: str, host: str, port: int, keystone_url: str | None) -> str:
    """Return its section of ceph.conf; with a Keystone (`keystone_url`, with /v3), Swift takes that one's tokens."""
    keystone = ""
    if keystone_url:
        keystone = _KEYSTONE.format(url=keystone_url.removesuffix("/v3"), password=PASSWORD)
    return _CONF.format(d=directory, host=host, port=port) + keystone


def glance_conf(directory: str, s3_url: str, *, swift: bool) -> str:
    """Return the sections of glance-api.conf for the stores `s3` and `swift`; the latter is there with a Keystone only.

    For auth version 1 Glance's swift store sends but a part of the user's name.
    """
    stores = _GLANCE_S3.format(url=s3_url, key=S3_KEY, secret=S3_SECRET, bucket=BUCKET, large_mib=LARGE_MIB)
    if swift:
        stores += _GLANCE_SWIFT.format(d=directory, container=CONTAINER)
    return stores


def s3_client(endpoint: str) -> Any:
    """Return a client of S3 as Glance's user. The caller's Python has botocore."""
    from botocore.session import get_session

    return get_session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="default",
        aws_access_key_id=S3_KEY,
        aws_secret_access_key=S3_SECRET,
    )


def allow_reader(endpoint: str) -> None:
    """Make Glance's bucket, if it is not there, and let the reader read it: what an operator does for basefs."""
    client = s3_client(endpoint)
    client.create_bucket(Bucket=BUCKET)
    bucket = f"arn:aws:s3:::{BUCKET}"
    statements = [
        {"Effect": "Allow", "Principal": {"AWS": ["arn:aws:iam:::user/rigreader"]}, "Action": action, "Resource": where}
        for action, where in (("s3:GetObject", f"{bucket}/*"), ("s3:ListBucket", bucket))
    ]
    client.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({"Version": "2012-10-17", "Statement": statements}))


def make_users(ceph: "Ceph") -> None:
    """Make Glance's user for S3, with a key for TempAuth, too, and the reader."""
    for uid, key, secret in (("rigglance", S3_KEY, S3_SECRET), ("rigreader", READER_KEY, READER_SECRET)):
        ceph.radosgw_admin(
            "user", "create", f"--uid={uid}", f"--display-name={uid}", f"--access-key={key}", f"--secret={secret}"
        )
    ceph.radosgw_admin(
        "subuser", "create", "--uid=rigglance", f"--subuser={SWIFT_USER}", "--access=full",
        "--key-type=swift", f"--secret={SWIFT_SECRET}",
    )  # fmt: skip

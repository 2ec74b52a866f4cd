"""The options of [rbd], [s3] and [swift], where Glance keeps images. A store without them is not used."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from oslo_config import cfg

from basefs.errors import ConfigError

RBD_SECTION = "rbd"
S3_SECTION = "s3"
SWIFT_SECTION = "swift"

RBD_OPTS: list[cfg.Opt] = [
    cfg.ListOpt(
        "pools",
        default=[],
        help="Pools in Ceph that Glance keeps images in (its rbd_store_pool). Empty: nothing is read from Ceph.",
    ),
    cfg.StrOpt("ceph_conf", default="/etc/ceph/ceph.conf", help="Ceph's configuration: monitors, where keyrings are."),
    cfg.StrOpt(
        "user",
        default="basefs",
        help="Ceph user without `client.`; its keyring is found as ceph_conf says. The caps `mon 'profile rbd' osd "
        "'profile rbd-read-only pool=POOL'` suffice.",
    ),
    cfg.IntOpt(
        "connect_timeout_s",
        default=5,
        min=1,
        max=300,
        help="Seconds that the monitors have to answer to a new connection (Ceph's client_mount_timeout).",
    ),
    cfg.IntOpt(
        "op_timeout_s",
        default=10,
        min=1,
        max=300,
        help="Seconds that a read may take (Ceph's rados_osd_op_timeout); then the next source is asked. Longer than a "
        "placement group needs to find another OSD is of no use: a guest waits.",
    ),
]

S3_OPTS: list[cfg.Opt] = [
    cfg.StrOpt(
        "endpoint",
        help="URL of the S3 service, http:// or https://, without a bucket; no request goes anywhere else. Not set: "
        "nothing is read from S3.",
    ),
    cfg.ListOpt(
        "buckets", default=[], help="Buckets that Glance keeps images in (its s3_store_bucket); BUCKET* is a prefix."
    ),
    cfg.StrOpt("region", default="us-east-1", help="Region that requests are signed for; radosgw and MinIO take any."),
    cfg.StrOpt("access_key", help="Access key. Keys in a location of Glance are never used."),
    cfg.StrOpt("secret_key", secret=True, help="Its secret."),
    cfg.StrOpt(
        "addressing_style",
        default="path",
        choices=[("path", "ENDPOINT/BUCKET/KEY"), ("virtual", "BUCKET.ENDPOINT/KEY, as AWS wants it of new buckets")],
        help="Where the bucket stands in a request.",
    ),
    cfg.ListOpt(
        "location_hosts",
        default=[],
        help="HOST[:PORT] by which Glance's locations name the service (its s3_store_host), where that is not the one "
        "in endpoint. Locations of another service are not used.",
    ),
    cfg.StrOpt("cafile", help="PEM file of the authorities that the service's certificate is checked with."),
    cfg.BoolOpt("insecure", default=False, help="Do not check the service's certificate."),
]

SWIFT_OPTS: list[cfg.Opt] = [
    cfg.ListOpt(
        "containers",
        default=[],
        help="Containers that Glance keeps images in (its swift_store_container); CONTAINER* is a prefix, as with "
        "swift_store_multiple_containers_seed. Empty: nothing is read from Swift. Without auth_type it is the user of "
        "[glance] who asks.",
    ),
    cfg.ListOpt(
        "location_hosts",
        default=[],
        help="HOST[:PORT] by which Glance's locations name Keystone or Swift, where that is not the one in auth_url or "
        "endpoint_override. Locations of another service are not used.",
    ),
    cfg.ListOpt(
        "config_references",
        default=["ref1"],
        help="References to Glance's swift_store_config_file that mean this account (locations swift+config://REF/...).",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RbdSettings:
    """`[rbd]`, checked. Names and bounds are those of the options."""

    pools: tuple[str, ...]
    ceph_conf: str
    user: str
    connect_timeout_s: int
    op_timeout_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """`[s3]`, checked. `endpoint` has no slash at its end; the secret is in no repr."""

    endpoint: str
    buckets: tuple[str, ...]
    region: str
    access_key: str
    secret_key: str = field(repr=False)
    is_virtual: bool = False
    location_hosts: tuple[str, ...] = ()
    cafile: str | None = None
    insecure: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SwiftSettings:
    """`[swift]` but for keystoneauth's options, checked."""

    containers: tuple[str, ...]
    location_hosts: tuple[str, ...] = ()
    config_references: tuple[str, ...] = ("ref1",)


def rbd_settings(conf: cfg.ConfigOpts) -> RbdSettings | None:
    """What `[rbd]` says; None where nothing is to be read from Ceph.

    Raises:
        ConfigError: names the option that is not usable.
    """
    section = conf[RBD_SECTION]
    if not section.pools:
        return None
    if not section.ceph_conf.startswith("/"):
        raise ConfigError(f"[rbd] ceph_conf must be an absolute path: {section.ceph_conf}")
    if section.user.startswith("client.") or not section.user:
        raise ConfigError(f"[rbd] user: {section.user!r} is no name of a Ceph user without `client.`")
    return RbdSettings(
        pools=tuple(section.pools),
        ceph_conf=section.ceph_conf,
        user=section.user,
        connect_timeout_s=section.connect_timeout_s,
        op_timeout_s=section.op_timeout_s,
    )


def s3_settings(conf: cfg.ConfigOpts) -> S3Settings | None:
    """What `[s3]` says; None where nothing is to be read from S3.

    Raises:
        ConfigError: names the options that are not usable, never a key.
    """
    section = conf[S3_SECTION]
    if not section.endpoint:
        return None
    problems = [f"[s3] {name} is not set" for name in ("buckets", "access_key", "secret_key") if not section[name]]
    url = urlsplit(section.endpoint)
    if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query or url.fragment:
        problems.append("[s3] endpoint is no http:// or https:// URL without credentials")
    if problems:
        raise ConfigError("; ".join(problems))
    return S3Settings(
        endpoint=section.endpoint.rstrip("/"),
        buckets=tuple(section.buckets),
        region=section.region,
        access_key=section.access_key,
        secret_key=section.secret_key,
        is_virtual=section.addressing_style == "virtual",
        location_hosts=tuple(host.lower() for host in section.location_hosts),
        cafile=section.cafile,
        insecure=section.insecure,
    )


def swift_settings(conf: cfg.ConfigOpts) -> SwiftSettings | None:
    """What `[swift]` says; None where nothing is to be read from Swift."""
    section = conf[SWIFT_SECTION]
    if not section.containers:
        return None
    return SwiftSettings(
        containers=tuple(section.containers),
        location_hosts=tuple(host.lower() for host in section.location_hosts),
        config_references=tuple(section.config_references),
    )


def swift_common_opts() -> list[cfg.Opt]:
    """Keystoneauth's options of [swift] that do not depend on `auth_type`: session, adapter, choice of the plugin."""
    # Here and not at the top: keystoneauth1 takes 0.5 s to import, and help texts do not need it.
    from keystoneauth1 import loading

    adapter = loading.get_adapter_conf_options()
    cfg.set_defaults(adapter, service_type="object-store")
    return [*loading.get_auth_common_conf_options(), *loading.get_session_conf_options(), *adapter]

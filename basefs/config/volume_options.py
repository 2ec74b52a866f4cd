"""The options of [cinder] and [volume_linking], and what they become."""

import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from oslo_config import cfg

from basefs.config.auth_sections import auth_section_of
from basefs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

CINDER_SECTION = "cinder"
LINKING_SECTION = "volume_linking"
HOST_CHARS_MAX = 150
"""The name of a clone holds it and an image id, and has 255 characters at most."""

VOLUME_LINKING_OPTS: list[cfg.Opt] = [
    cfg.DictOpt(
        "image_volume_map",
        default={},
        help="Volumes behind images of which Glance tells no location in Cinder, as IMAGE_ID:VOLUME_ID, separated by "
        "commas. The volume has the image's bytes from its first one on; this goes before Glance's locations.",
    ),
    cfg.BoolOpt(
        "use_volume_metadata",
        default=False,
        help="Take the volume whose metadata has glance_image_id, where neither the map nor Glance names one. Only "
        "where nobody but operators may set the metadata of volumes that the user of [cinder] sees.",
    ),
    cfg.StrOpt(
        "host",
        help="Name by which this host's attachments and clones in Cinder are known; default: the host name. Two basefs "
        "with the same name delete each other's: each mount of a machine needs a name of its own.",
    ),
    cfg.BoolOpt(
        "multipath",
        default=False,
        help="Attach over all paths to the storage (iSCSI, FC, NVMe-oF); multipathd must run. As [libvirt] "
        "volume_use_multipath of nova.conf.",
    ),
    cfg.StrOpt(
        "lock_path",
        help="Directory of os-brick's locks; default: os-brick in cache_dir. Where nova or Glance attach volumes on "
        "this host too: their lock_path of [os_brick] or [oslo_concurrency], so that no two connect at a time.",
    ),
    cfg.FloatOpt(
        "attach_deadline_s",
        default=60.0,
        min=1.0,
        max=3600.0,
        help="Seconds that attaching may take, without the making of a clone; then it is undone, and tried again "
        "later. Reads go through Glance meanwhile.",
    ),
    cfg.FloatOpt(
        "detach_idle_s",
        default=300.0,
        min=0.0,
        max=604800.0,
        help="Seconds after the last close of an image, with no overlay on it, after which its volume is detached.",
    ),
    cfg.IntOpt(
        "attach_concurrency_max",
        default=4,
        min=1,
        max=64,
        help="Volumes that are attached or detached at a time; each needs a process of 60 MiB.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeLinkingSettings:
    """`[volume_linking]`, checked. Names and bounds are those of the options."""

    image_volume_map: "Mapping[str, str]"
    use_volume_metadata: bool
    host: str
    multipath: bool
    lock_path: Path
    attach_deadline_s: float
    detach_idle_s: float
    attach_concurrency_max: int


def volume_linking_settings(conf: cfg.ConfigOpts, cache_dir: Path) -> VolumeLinkingSettings:
    """What the section says.

    Raises:
        ConfigError: Names every option that is not usable, and why.
    """
    section = conf[LINKING_SECTION]
    host = section.host or socket.gethostname()
    lock_path = section.lock_path or str(cache_dir / "os-brick")
    problems = [
        f"[volume_linking] image_volume_map: {image_id}:{volume_id} is no pair of ids"
        for image_id, volume_id in section.image_volume_map.items()
        if not _is_id(image_id) or not _is_id(volume_id)
    ]
    if len(host) > HOST_CHARS_MAX or not host.isprintable() or " " in host:
        problems.append(f"[volume_linking] host: {host!r} is no host name of at most {HOST_CHARS_MAX} characters")
    if not lock_path.startswith("/") or "\0" in lock_path:
        problems.append(f"[volume_linking] lock_path must be an absolute path: {lock_path}")
    if problems:
        raise ConfigError("; ".join(problems))
    pairs = {image_id.lower(): volume_id.lower() for image_id, volume_id in section.image_volume_map.items()}
    return VolumeLinkingSettings(
        image_volume_map=MappingProxyType(pairs),
        use_volume_metadata=section.use_volume_metadata,
        host=host,
        multipath=section.multipath,
        lock_path=Path(lock_path),
        attach_deadline_s=section.attach_deadline_s,
        detach_idle_s=section.detach_idle_s,
        attach_concurrency_max=section.attach_concurrency_max,
    )


def cinder_common_opts() -> list[cfg.Opt]:
    """The options of [cinder] that do not depend on `auth_type`: session, adapter, choice of the plugin."""
    # Here and not at the top: keystoneauth1 takes 0.5 s to import, and help texts do not need it.
    from keystoneauth1 import loading

    adapter = loading.get_adapter_conf_options()
    cfg.set_defaults(adapter, service_type="block-storage")
    return [*loading.get_auth_common_conf_options(), *loading.get_session_conf_options(), *adapter]


def cinder_auth_section(conf: cfg.ConfigOpts) -> str:
    """See `auth_section_of`."""
    return auth_section_of(conf, CINDER_SECTION)


def _is_id(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False

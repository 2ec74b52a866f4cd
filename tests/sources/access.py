"""Access to a Glance, real or fake, as the service gets it: from a configuration file."""

from oslo_config import cfg

from basefs.config.loading import load_settings
from basefs.sources.access import GlanceAccess, open_glance
from basefs.sources.glance import GlanceSource
from basefs.sources.tier import CacheTierSource
from basefs.sources.tier_http import open_tier


def access_to(tmp_path, conf_lines: str, *, threads_max: int = 8) -> GlanceAccess:
    return open_glance(conf_of(tmp_path, conf_lines), threads_max=threads_max)


def conf_of(tmp_path, conf_lines: str) -> cfg.ConfigOpts:
    mountpoint = tmp_path / "conf" / "mnt"
    mountpoint.mkdir(parents=True, exist_ok=True)
    path = tmp_path / "conf" / "basefs.conf"
    path.write_text(
        f"[basefs]\nmountpoint = {mountpoint}\ncache_dir = {tmp_path}/conf/cache\n"
        f"control_socket = {tmp_path}/conf/socket\n{conf_lines}"
    )
    conf, _settings = load_settings([str(path)])
    return conf


def over_tier(tmp_path, glance, tier, nursery, *, lines="", jitter=lambda: 0.0) -> tuple[CacheTierSource, GlanceAccess]:
    """A source over the front `tier`, behind which is the front `glance`; each of the two is asked for itself, too."""
    conf = conf_of(tmp_path, f"{glance.conf_lines()}{lines}cache_endpoint = {tier.url}/\n")
    access = open_glance(conf, threads_max=8)
    cache = open_tier(conf, access, threads_max=8)
    assert cache is not None
    source = GlanceSource(access, threads_max=8)
    return CacheTierSource(cache, source, nursery, outage=access.endpoints.outage, jitter=jitter), access

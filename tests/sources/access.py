"""Access to a Glance, real or fake, as the service gets it: from a configuration file."""

from basefs.config.loading import load_settings
from basefs.sources.access import GlanceAccess, open_glance


def access_to(tmp_path, conf_lines: str, *, threads_max: int = 8) -> GlanceAccess:
    mountpoint = tmp_path / "conf" / "mnt"
    mountpoint.mkdir(parents=True, exist_ok=True)
    path = tmp_path / "conf" / "basefs.conf"
    path.write_text(
        f"[basefs]\nmountpoint = {mountpoint}\ncache_dir = {tmp_path}/conf/cache\n"
        f"control_socket = {tmp_path}/conf/socket\n{conf_lines}"
    )
    conf, _settings = load_settings([str(path)])
    return open_glance(conf, threads_max=threads_max)

"""The configuration: oslo.config options in, one frozen `Settings` out. Nothing else reads a configuration file."""

from basefs.config.files import DEFAULT_CONFIG_DIR, DEFAULT_CONFIG_FILE, find_config_files
from basefs.config.loading import load_mount_settings, load_settings
from basefs.config.options import list_opts
from basefs.config.settings import Settings

__all__ = [
    "DEFAULT_CONFIG_DIR",
    "DEFAULT_CONFIG_FILE",
    "Settings",
    "find_config_files",
    "list_opts",
    "load_mount_settings",
    "load_settings",
]

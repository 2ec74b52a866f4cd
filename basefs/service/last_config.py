"""The configuration, or the last one that worked: a typing error must not keep a mount without a server.

The text of the files that a server serves with is in an fd of no file, which the keeper holds for the next server.
"""

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass

from oslo_config import cfg

from basefs.config import Settings, find_config_files, load_settings
from basefs.errors import ConfigError
from basefs.service.arguments import Arguments
from basefs.service.keeper_channel import KeeperChannel

CONFIG_KEY = "config"
"""Under which the keeper holds the text (basefs/keeper_crew.py)."""
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_COPY_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What was read. `fd` has the text of the files; `error` is why they were not used, empty if they were."""

    conf: cfg.ConfigOpts
    settings: Settings
    fd: int | None
    error: str


def load(arguments: Arguments) -> Loaded:
    """The configuration of the files; if they are not usable and an earlier one is at hand, that one.

    Raises:
        ConfigError: The files are not usable, and there is nothing else.
    """
    error = arguments.config_failure
    if arguments.config_fd is None or not error:
        try:
            return _of_files(arguments)
        except ConfigError as exc:
            if arguments.config_fd is None:
                raise
            error = str(exc)
    conf, settings = load_settings([f"/proc/self/fd/{arguments.config_fd}"])
    return Loaded(conf=conf, settings=settings, fd=None, error=error)


async def keep(channel: KeeperChannel, loaded: Loaded) -> None:
    """Leave the text with the keeper: a server serves with it."""
    for held in channel.take(CONFIG_KEY):
        os.close(held.fd)
    if loaded.fd is not None:
        await channel.hold(CONFIG_KEY, "", loaded.fd)
        os.close(loaded.fd)


def _of_files(arguments: Arguments) -> Loaded:
    for _ in range(_COPY_TRIES):
        paths = find_config_files(arguments.config_files, arguments.config_dirs)
        before = _states(paths)
        conf, settings = load_settings(arguments.config_files, arguments.config_dirs)
        fd = _copy(paths)
        if _states(paths) == before:
            return Loaded(conf=conf, settings=settings, fd=fd, error="")
        if fd is not None:
            os.close(fd)  # Somebody is writing the files: what was read is not what was copied.
    return Loaded(conf=conf, settings=settings, fd=None, error="")


def _states(paths: Sequence[str]) -> list[tuple[int, int, int]]:
    try:
        return [(found.st_ino, found.st_size, found.st_mtime_ns) for found in map(os.stat, paths)]
    except OSError:
        return []


def _copy(paths: Sequence[str]) -> int | None:
    """One file after the other, in memory: later ones win, as they do one by one. None if it cannot be made."""
    fd = os.memfd_create("basefs-config", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for path in paths:
            with open(path, "rb") as file:
                os.write(fd, file.read() + b"\n")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        return None
    return fd

"""Which configuration files count, and which section and key stands where in them."""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oslo_config import cfg, iniparser

from basefs.errors import ConfigError

DEFAULT_CONFIG_FILE = "/etc/basefs/basefs.conf"
DEFAULT_CONFIG_DIR = "/etc/basefs/basefs.conf.d"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One `[section]` (`key` is None) or one `key = value` of a file; the value is not kept, it may be a secret.

    `section` and `key` are as written, `line` counts from 1.
    """

    path: str
    line: int
    section: str
    key: str | None


def find_config_files(config_files: Sequence[str] = (), config_dirs: Sequence[str] = ()) -> list[str]:
    """Absolute paths of the files to read, in order: later ones win.

    Without any argument `/etc/basefs/basefs.conf` and `/etc/basefs/basefs.conf.d/*.conf`, where they exist; with
    arguments exactly those files, then `*.conf` of those directories in order of their names.

    Raises:
        ConfigError: A file or directory that was asked for is not there.
    """
    if not config_files and not config_dirs:
        defaults = [DEFAULT_CONFIG_FILE] if os.path.exists(DEFAULT_CONFIG_FILE) else []
        return [*defaults, *_files_of(DEFAULT_CONFIG_DIR)]
    found = [os.path.abspath(os.path.expanduser(path)) for path in config_files]
    for path in found:
        if not os.path.isfile(path):
            raise ConfigError(f"configuration file {path} does not exist or is no file")
    for directory in config_dirs:
        absolute = os.path.abspath(os.path.expanduser(directory))
        if not os.path.isdir(absolute):
            raise ConfigError(f"configuration directory {absolute} does not exist or is no directory")
        found += _files_of(absolute)
    return found


def read_entries(paths: Iterable[str]) -> list[Entry]:
    """Every section and key of the files, in order.

    Raises:
        ConfigError: A file cannot be read or parsed; the text of the line is not shown, it may hold a secret.
    """
    found: list[Entry] = []
    for path in paths:
        parser = _KeyCollector(path)
        try:
            parser.parse()
        except iniparser.ParseError as exc:
            raise ConfigError(f"{path}, line {exc.lineno}: {_parse_problem(exc.msg)}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not UTF-8 text") from None
        except OSError as exc:
            raise ConfigError(f"{path} cannot be read: {exc.strerror}") from None
        found += parser.found
    return found


def _files_of(directory: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(directory), "*.conf")))


def _parse_problem(message: str) -> str:
    if "assignment" in message and "started" not in message:
        return "neither a [section] nor `key = value`"
    if "started" in message:
        return "a `key = value` before the first [section]"
    return message.lower()


class _KeyCollector(cfg.ConfigParser):
    """oslo.config's own parser, so that both agree on what a line means; remembers where each key stands."""

    def __init__(self, path: str) -> None:
        super().__init__(path, {})
        self.found: list[Entry] = []
        self._key_line = 0

    def new_section(self, section: str) -> None:
        super().new_section(section)
        self.found.append(Entry(path=self.filename, line=self.lineno, section=section, key=None))

    def _split_key_value(self, line: str) -> tuple[str, list[str]]:
        # An assignment is reported when the *next* line ends its value, so its own line is noted here.
        self._key_line = self.lineno
        return super()._split_key_value(line)

    def assignment(self, key: str, value: list[str]) -> None:
        super().assignment(key, value)
        assert self.section is not None
        self.found.append(Entry(path=self.filename, line=self._key_line, section=self.section, key=key))

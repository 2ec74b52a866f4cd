"""A configuration that loads, for tests to spoil."""

from collections.abc import Callable
from pathlib import Path

import pytest

Load = Callable[..., object]


class ConfigFile:
    """basefs.conf with the least that works; `load(basefs={...}, glance={...})` changes or adds options."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "basefs.conf"
        (directory / "base").mkdir()

    def write(self, basefs=None, glance=None, default=None, tail: str = "") -> str:
        sections = {
            "DEFAULT": default or {},
            "basefs": {
                "mountpoint": self.directory / "base",
                "cache_dir": self.directory / "cache",
                "control_socket": self.directory / "control.sock",
                **(basefs or {}),
            },
            "glance": {"auth_type": "none", "endpoint_override": "http://127.0.0.1:9292", **(glance or {})},
        }
        lines = []
        for name, values in sections.items():
            lines += [f"[{name}]", *(f"{key} = {value}" for key, value in values.items() if value is not None)]
        self.path.write_text("\n".join(lines) + "\n" + tail, encoding="utf-8")
        return str(self.path)

    def load(self, **sections):
        from basefs.config import load_settings

        return load_settings([self.write(**sections)])

    def settings(self, **options):
        return self.load(basefs=options)[1]


@pytest.fixture
def config_file(tmp_path: Path) -> ConfigFile:
    return ConfigFile(tmp_path)

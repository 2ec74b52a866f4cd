"""What a server is started with, and what of its configuration cannot change while the mount stays."""

import dataclasses
from dataclasses import dataclass, field

from basefs.config import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What the keeper hands to a server (docs/DESIGN.md, section 1)."""

    session_fd: int
    keeper_fd: int
    lower_fd: int
    lock_fd: int
    keeper_pid: int
    config_files: list[str]
    config_dirs: list[str]
    config_fd: int | None = None
    """The text of the last configuration that worked, for when the files are not usable any more."""
    config_failure: str = ""
    """What servers failed with again and again under the files of now: they are not to be used."""
    is_standby: bool = False
    """Nobody waits for `loaded`: everything is imported before it."""
    fixed: dict[str, str] = field(default_factory=dict)
    """Options by name that cannot change while it is mounted, as they were then; empty at the first start."""


def with_fixed(settings: Settings, fixed: dict[str, str]) -> tuple[Settings, list[str]]:
    """The settings with the `fixed` ones in their places, and in words which options of the files do not apply."""
    not_applied = [
        f"{name} = {value}: it stays {kept} until the next mount"
        for name, kept in fixed.items()
        if (value := str(getattr(settings, name))) != kept
    ]
    kept_values = {name: type(getattr(settings, name))(kept) for name, kept in fixed.items()}
    return dataclasses.replace(settings, **kept_values), not_applied


def option_texts(settings: Settings) -> dict[str, str]:
    """Every option of [basefs] as text, for the keeper to tell which ones an upgrade changed."""
    return {field.name: str(getattr(settings, field.name)) for field in dataclasses.fields(settings)}

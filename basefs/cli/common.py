"""What the commands share: errors in one line, the control client, sizes for people."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from cliff.columns import FormattableColumn
from cliff.command import Command

from basefs.errors import BasefsError

if TYPE_CHECKING:
    from basefs.cli.app import BasefsApp
    from basefs.config import Settings
    from basefs.control.client import ControlClient

FAILURE = 1
INTERRUPTED = 130
KIB = 1024


class BasefsCommand(Command):
    """A command whose foreseen failures are one line on stderr and exit code 1. Mixed in before cliff's bases."""

    app: "BasefsApp"  # type: ignore[mutable-override]  # cliff gives a command the App that runs it

    def run(self, parsed_args: argparse.Namespace) -> int:
        """See cliff; what `take_action` says, or 1."""
        try:
            return super().run(parsed_args)
        except BasefsError as exc:
            say_error(str(exc))
            return FAILURE

    @property
    def settings(self) -> "Settings":
        """The checked settings of [basefs]."""
        return self.app.settings

    def client(self) -> "ControlClient":
        """A client for the running server."""
        from basefs.control.client import ControlClient

        return ControlClient(self.settings.control_socket)


def say_error(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"basefs: {' '.join(text.split())}\n")


def human_bytes(count: float) -> str:
    """`1.5 GiB`, `17 B`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < KIB:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= KIB
    return f"{count:.1f} TiB"


class SizeColumn(FormattableColumn[int | None]):
    """A number of bytes: a number in JSON and YAML, with its unit in a table."""

    def human_readable(self) -> str:
        """`1.5 GiB`, or nothing where the size is unknown."""
        return "" if self._value is None else human_bytes(self._value)


class SourcesColumn(FormattableColumn[list[dict[str, Any]]]):
    """Where images may be read: JSON as the server says it, one line each in a table."""

    def human_readable(self) -> str:
        """`rbd at <cluster>: resting: <reason>`."""
        return "\n".join(
            f"{one['source']}{' at ' if one['endpoint'] else ''}{one['endpoint']}: {one['state']}"
            + (f": {why}" if (why := one.get("reason") or one.get("error")) else "")
            for one in self._value
        )


def columns_of(values: dict[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names and values as cliff's ShowOne wants them; sizes become readable in tables."""
    return tuple(values), tuple(cell(name, value) for name, value in values.items())


def cell(name: str, value: object) -> object:
    """A table's cell for the value of that name."""
    if name in ("sources", "stores") and isinstance(value, list):
        return SourcesColumn(value)
    is_size = name in ("size", "shown_size") or name.endswith("_bytes")
    return SizeColumn(value) if is_size and (value is None or isinstance(value, int)) else value

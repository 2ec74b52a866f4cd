"""What the commands share: errors in one line, the control client."""

import argparse
import sys
from typing import TYPE_CHECKING

from cliff.command import Command

from basefs.errors import BasefsError

if TYPE_CHECKING:
    from basefs.cli.app import BasefsApp
    from basefs.config import Settings
    from basefs.control.client import ControlClient

FAILURE = 1
INTERRUPTED = 130


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

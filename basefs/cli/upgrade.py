"""`basefs upgrade`: a server of what is installed and configured now takes over, while everything is served."""

import argparse
from typing import Any

from cliff.show import ShowOne

from basefs.cli.cells import columns_of
from basefs.cli.common import FAILURE, BasefsCommand, say_error
from basefs.cli.keeper_client import ask_keeper

SLACK_S = 90.0
"""What may come after `upgrade_deadline_s`: the old server's end, the new one's start, and the way back."""


class Upgrade(BasefsCommand, ShowOne):
    """Replace the running server by the installed version and configuration; exit code 1 if the old one serves on."""

    _has_failed = False

    def take_action(self, _parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Names and values for cliff."""
        settings = self.settings
        answer = ask_keeper(settings.control_socket, "upgrade", deadline_s=settings.upgrade_deadline_s + SLACK_S)
        if not answer.get("upgraded"):
            self._has_failed = True
            say_error(str(answer.get("error", "the keeper did not say why it failed")))
        return columns_of(answer)

    def run(self, parsed_args: argparse.Namespace) -> int:
        """See cliff; 1 when the old version serves on."""
        code = super().run(parsed_args)
        return FAILURE if self._has_failed else code

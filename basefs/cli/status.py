"""`basefs status`: what the running server says of itself, and its keeper of both."""

import argparse
import contextlib
from typing import Any

from cliff.show import ShowOne

from basefs.cli.cells import columns_of
from basefs.cli.common import BasefsCommand
from basefs.cli.keeper_client import ask_keeper
from basefs.errors import ControlError

OF_THE_KEEPER = (
    "standby_pid", "standby_state", "deaths", "last_death", "held_fds", "config_error", "readers", "reader_deaths",
    "readers_reason",
)  # fmt: skip


class Status(BasefsCommand, ShowOne):
    """Show what the running basefs does; while no server answers, what its keeper knows."""

    def take_action(self, _parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Names and values for cliff."""
        try:
            status = self.client().status()
        except ControlError as exc:
            return columns_of(self._of_keeper(exc))
        with contextlib.suppress(ControlError):
            keeper = ask_keeper(self.settings.control_socket, "status")
            status |= {name: keeper.get(name) for name in OF_THE_KEEPER}
        return columns_of(status)

    def _of_keeper(self, server_error: ControlError) -> dict[str, Any]:
        """What the keeper says.

        Raises:
            ControlError: It says nothing either; this is the server's error.
        """
        try:
            keeper = ask_keeper(self.settings.control_socket, "status")
        except ControlError:
            raise server_error from None
        return {**keeper, "server_error": str(server_error)}

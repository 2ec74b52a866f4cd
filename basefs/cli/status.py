"""`basefs status`: what the running server says of itself."""

import argparse
from typing import Any

from cliff.show import ShowOne

from basefs.cli.common import BasefsCommand, columns_of


class Status(BasefsCommand, ShowOne):
    """Show what the running basefs does."""

    def take_action(self, _parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Names and values for cliff."""
        return columns_of(self.client().status())

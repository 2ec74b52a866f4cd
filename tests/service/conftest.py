"""What the tests of the service share."""

import os
import signal
from collections.abc import Callable

import pytest

from tests.semantics.conftest import eventually, status
from tools.mount import BasefsMount


@pytest.fixture
def kill_server() -> Callable[[BasefsMount], None]:
    """Kill a mount's server with SIGKILL; returns when the next one serves."""

    def kill(mount: BasefsMount) -> None:
        before = status(mount)["server_pid"]
        os.kill(before, signal.SIGKILL)
        # An open waits for the next server; the kernel may still answer for the one that dies.
        eventually(lambda: status(mount)["server_pid"] != before)

    return kill

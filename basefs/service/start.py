"""A server from its arguments to its exit code."""

import json
import logging
import os
import resource
import sys

import trio

from basefs import errors
from basefs.observability import set_up_logging
from basefs.service import last_config
from basefs.service.arguments import Arguments
from basefs.service.keeper_channel import KeeperChannel
from basefs.service.server import serve

log = logging.getLogger(__name__)


def main() -> int:
    """The exit code: 0 when the mount is gone or the keeper said `stop`, 1 when it could not begin or failed."""
    # Every lower file that the kernel knows of and every image in use costs an fd or two; what earlier servers held
    # comes at once.
    _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))
    arguments = Arguments(**json.loads(sys.argv[1]))
    channel = KeeperChannel(arguments.keeper_fd)
    try:
        loaded = last_config.load(arguments)
    except errors.BasefsError as exc:
        channel.send({"type": "failed", "kind": "config", "error": str(exc)})
        return 1
    set_up_logging(loaded.conf)
    if arguments.config_fd is not None:
        os.close(arguments.config_fd)
    try:
        trio.run(serve, arguments, loaded, channel)
    except errors.BasefsError as exc:
        # One that waits in another's place ends with its keeper, and nobody has lost anything.
        level = logging.INFO if arguments.is_standby and not channel.begun else logging.ERROR
        log.log(level, "%s", exc)
        return 1
    return 0

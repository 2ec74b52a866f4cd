"""`python -m basefs.service '<JSON>'`: started by the keeper, not by hand."""

import json
import logging
import os
import resource
import sys

import trio

from basefs import errors
from basefs.config import load_settings
from basefs.hardening import forbid_core_files
from basefs.observability import set_up_logging
from basefs.service.arguments import Arguments, with_fixed
from basefs.service.keeper_channel import KeeperChannel
from basefs.service.server import serve

log = logging.getLogger(__name__)


def main() -> int:
    """The exit code: 0 when the mount is gone or the keeper said `stop`, 1 when it could not begin or failed."""
    forbid_core_files()
    # Every lower file that the kernel knows of and every image in use costs an fd or two; what earlier servers held
    # comes at once.
    _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))
    arguments = Arguments(**json.loads(sys.argv[1]))
    channel = KeeperChannel(arguments.keeper_fd)
    try:
        conf, settings = load_settings(arguments.config_files, arguments.config_dirs)
    except errors.BasefsError as exc:
        channel.send({"type": "failed", "kind": "config", "error": str(exc)})
        return 1
    set_up_logging(conf)
    settings, not_applied = with_fixed(settings, arguments.fixed or {})
    try:
        trio.run(serve, arguments, conf, settings, channel, not_applied)
    except errors.BasefsError as exc:
        log.error("%s", exc)  # noqa: TRY400  (foreseen: no traceback)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    # A thread that hangs in a request cannot be stopped and must not keep the process.
    logging.shutdown()
    os._exit(code)

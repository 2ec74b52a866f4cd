"""`python -m basefs.service '<JSON>'`: started by the keeper, not by hand."""

import gc
import json
import logging
import os
import sys
from collections.abc import Callable

from basefs.hardening import forbid_core_files, keep_files_private
from basefs.service import process


def _import_main() -> Callable[[], int]:
    # Until everything stands (`server.py` turns it on): the collector walked all modules again and again while they
    # were imported, for a tenth of the time to start. Here, for tests import modules of this package, and lost it, too.
    gc.disable()
    # Late: it imports for a second and more, and a standby whose keeper dies meanwhile must not stay.
    from basefs.service.start import main

    return main


if __name__ == "__main__":
    if not process.die_with_keeper(json.loads(sys.argv[1])["keeper_pid"]):
        sys.exit(1)
    forbid_core_files()
    keep_files_private()
    code = _import_main()()
    # A thread that hangs in a request cannot be stopped and must not keep the process.
    logging.shutdown()
    os._exit(code)

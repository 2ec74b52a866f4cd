"""wsgi_run.py MODULE:ATTR FD THREADS LIFELINE_FD REQUEST_LOG: one OpenStack WSGI application under gunicorn.

Runs inside `.venvs/glance`, one gthread worker on the listening socket FD. Whoever started it holds the other end of
the pipe LIFELINE_FD (-1: none): when that closes, however its holder died, the process group of this service ends.

The application is imported in the worker after sys.argv was reset, because keystone parses sys.argv by itself.
"""

import importlib
import sys
from typing import Any

from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from sqlalchemy import event  # type: ignore[import-not-found]
from sqlalchemy.engine import Engine  # type: ignore[import-not-found]

from tools.rig.request_log import end_with, recorded


def begin_immediate(conn: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: Any) -> Any:
    """Begin each sqlite transaction as a writer.

    A transaction that reads first and writes then fails at once with "database is locked" when another thread wrote
    meanwhile; a writer waits its turn (`?timeout=` in the URL).
    """
    if statement == "BEGIN" and conn.dialect.name == "sqlite":
        statement = "BEGIN IMMEDIATE"
    return statement, parameters


event.listen(Engine, "before_cursor_execute", begin_immediate, retval=True)


def main() -> None:
    spec, listen_fd, threads, lifeline_fd, request_log = sys.argv[1:6]
    sys.argv = [spec.split(".")[0] + "-api"]
    end_with(int(lifeline_fd))

    class App(BaseApplication):  # type: ignore[misc] # gunicorn has no types
        def load_config(self) -> None:
            settings = {
                "bind": f"fd://{listen_fd}",
                "worker_class": "gthread",
                "workers": 1,
                "threads": int(threads),
                "timeout": 600,
                "graceful_timeout": 1,
                "keepalive": 30,
                "control_socket_disable": True,  # else it writes to ~/.gunicorn
            }
            for name, value in settings.items():
                if name in self.cfg.settings:
                    self.cfg.set(name, value)

        def load(self) -> Any:
            module, attribute = spec.split(":")
            return recorded(getattr(importlib.import_module(module), attribute), request_log)

    App().run()


main()

"""wsgi_run.py MODULE:ATTR FD THREADS LIFELINE_FD REQUEST_LOG: one OpenStack WSGI application under gunicorn.

Runs inside `.venvs/glance`, one gthread worker on the listening socket FD. Whoever started it holds the other end of
the pipe LIFELINE_FD (-1: none): when that closes, however its holder died, the process group of this service ends.

The application is imported in the worker after sys.argv was reset, because keystone parses sys.argv by itself.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from sqlalchemy import event  # type: ignore[import-not-found]
from sqlalchemy.engine import Engine  # type: ignore[import-not-found]


def begin_immediate(conn: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: Any) -> Any:
    """Begin each sqlite transaction as a writer.

    A transaction that reads first and writes then fails at once with "database is locked" when another thread wrote
    meanwhile; a writer waits its turn (`?timeout=` in the URL).
    """
    if statement == "BEGIN" and conn.dialect.name == "sqlite":
        statement = "BEGIN IMMEDIATE"
    return statement, parameters


event.listen(Engine, "before_cursor_execute", begin_immediate, retval=True)


def recorded(app: Any, log_path: str) -> Any:
    """Wrap `app` so that one JSON line a request is in `log_path` before its answer's first byte leaves."""
    log_fd = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def wrapper(environ: dict[str, Any], start_response: Any) -> Any:
        path = environ.get("PATH_INFO", "")  # routers shift it before they answer

        def start(status: str, headers: list[tuple[str, str]], *args: Any) -> Any:
            record = {
                "at": time.time(),
                "method": environ["REQUEST_METHOD"],
                "path": path,
                "query": environ.get("QUERY_STRING", ""),
                "range": environ.get("HTTP_RANGE", ""),
                "status": int(status.split(None, 1)[0]),
                "length": int({k.lower(): v for k, v in headers}.get("content-length", -1)),
            }
            os.write(log_fd, json.dumps(record).encode() + b"\n")
            return start_response(status, headers, *args)

        return app(environ, start)

    return wrapper


def end_with(lifeline_fd: int) -> None:
    """Kill this process group as soon as the other end of the pipe is closed."""
    os.read(lifeline_fd, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    spec, listen_fd, threads, lifeline_fd, request_log = sys.argv[1:6]
    sys.argv = [spec.split(".")[0] + "-api"]
    if int(lifeline_fd) >= 0:
        threading.Thread(target=end_with, args=(int(lifeline_fd),), daemon=True).start()

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

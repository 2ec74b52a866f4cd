"""What every WSGI service of the rig is wrapped in: a log of its requests, and an end with its starter."""

import json
import os
import signal
import threading
import time
from typing import Any


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
    """Kill this process group as soon as the other end of the pipe is closed; -1: never."""
    if lifeline_fd >= 0:
        threading.Thread(target=_end_with, args=(lifeline_fd,), daemon=True).start()


def _end_with(lifeline_fd: int) -> None:
    os.read(lifeline_fd, 1)
    os.killpg(0, signal.SIGKILL)

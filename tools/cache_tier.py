"""python -m tools.cache_tier DIRECTORY GLANCE_URL: a cache tier before a Glance, on loopback, until it is interrupted.

It is Debian's nginx (`tools/setup nginx`) with the file that is shipped, `etc/nginx/basefs-cache-tier.conf`, of which
only addresses, paths and sizes are others.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from tools.rig.processes import ROOT, RigError, listening_socket

NGINX = Path(ROOT) / ".venvs/nginx/usr/sbin/nginx"
SHIPPED = Path(ROOT) / "etc/nginx/basefs-cache-tier.conf"
SLICE_BYTES = 128 << 10
START_S = 20.0
END_S = 10.0
_LOGGED = re.compile(r'"(?P<method>\S+) (?P<path>\S+) [^"]*" (?P<status>\d+) (?P<sent>\d+) ')


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request that the tier has answered; `sent_bytes` are its body's."""

    method: str
    path: str
    status: int
    sent_bytes: int


class CacheTier:
    """A running nginx in front of `glance_url`, with all it writes under `directory`.

    With `authorised_s10` Glance's yes to a token holds for 10 s (the lines `#+` of the file). It ends with the thread
    that started it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        glance_url: str,
        *,
        host: str = "127.0.0.1",
        authorised_s10: bool = False,
    ) -> None:
        self.directory = Path(directory).resolve()
        self._host = host
        self._glance = urlsplit(glance_url).netloc
        self._authorised_s10 = authorised_s10
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What `[glance] cache_endpoint` is set to; the same after a restart."""
        return f"http://{self._host}:{self._port}"

    @property
    def pid(self) -> int:
        """The leader of its process group."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, on the port that it had before; returns when it listens, with the cache that it left."""
        if not NGINX.exists():
            raise RigError(f"{NGINX} is not there: run `tools/setup nginx`")
        self.directory.mkdir(parents=True, exist_ok=True)
        with listening_socket(self._host, self._port) as sock:
            self._port = sock.getsockname()[1]
            sock.setblocking(False)  # as nginx makes its own: who finds a connection taken would hang in accept
            self._configure()
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", str(NGINX), "-e", str(self._log), "-c", str(self._main_conf)],
                env={"PATH": os.environ["PATH"], "NGINX": f"{sock.fileno()};"},  # it finds its listening socket there
                pass_fds=(sock.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while not self._pid_path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RigError(f"nginx did not start:\n{self.error_log()}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End it; what it has cached stays in the directory."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a failing host does; connections break, its port refuses new ones."""
        self._end(signal.SIGKILL)

    def served(self) -> list[Served]:
        """Every request that it has answered so far, oldest first, authorisations left out."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.directory / "basefs-tier.log").read_text(encoding="utf-8").splitlines()
            found = [hit for line in lines if (hit := _LOGGED.search(line))]
            return [
                Served(method=hit["method"], path=hit["path"], status=int(hit["status"]), sent_bytes=int(hit["sent"]))
                for hit in found
            ]
        return []

    def cached_files(self) -> list[Path]:
        """The slices that it keeps."""
        return [path for path in (self.directory / "cache").rglob("*") if path.is_file()]

    def error_log(self) -> str:
        """What it has complained about."""
        paths = (self._log, self.directory / "basefs-tier-error.log")
        return "".join(path.read_text(encoding="utf-8") for path in paths if path.exists())

    # -- inside

    @property
    def _log(self) -> Path:
        return self.directory / "nginx.log"

    @property
    def _main_conf(self) -> Path:
        return self.directory / "nginx.conf"

    @property
    def _pid_path(self) -> Path:
        return self.directory / "nginx.pid"

    def _configure(self) -> None:
        shipped = SHIPPED.read_text(encoding="utf-8")
        if self._authorised_s10:
            shipped = shipped.replace("#+", "")
        d = str(self.directory)
        for old, new in (
            ("glance.example.org:9292", self._glance),
            ("listen 9292;", f"listen {self._host}:{self._port};"),
            ("/var/cache/basefs-tier", f"{d}/cache"),
            ("/run/basefs-tier", f"{d}/authorised"),
            ("/var/log/nginx/", f"{d}/"),
            ("min_free=10g", "min_free=256m"),
        ):
            if old not in shipped:
                raise RigError(f"{SHIPPED} has no {old}")
            shipped = shipped.replace(old, new)
        (self.directory / "tier.conf").write_text(shipped, encoding="utf-8")
        temporary = "".join(
            f"    {kind}_temp_path {d}/temporary-{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        self._main_conf.write_text(
            ("user root;\n" if os.geteuid() == 0 else "")  # whose directories a test's are
            + f"daemon off;\npid {self._pid_path};\nworker_processes 2;\nerror_log {self._log} warn;\n"
            f"events {{\n    worker_connections 4096;\n}}\nhttp {{\n{temporary}    include {d}/tier.conf;\n}}\n",
            encoding="utf-8",
        )

    def _end(self, signum: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if signum == signal.SIGKILL:
                os.killpg(process.pid, signum)  # its workers, too
            else:
                process.send_signal(signum)
        try:
            process.wait(END_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._pid_path.unlink(missing_ok=True)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(f"usage: {__doc__}")
    with CacheTier(sys.argv[1], sys.argv[2]) as tier:
        print(f"[glance]\ncache_endpoint = {tier.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()

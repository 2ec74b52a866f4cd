"""Network namespaces: the site, in which this process and all services run, and nodes behind links of 1 Gbit/s.

Each node has a veth pair to a bridge of the site, and a token bucket (tc tbf) at both of its ends. The kernels of test
machines have no netem, so a link has a rate and no delay. Nothing of it is in the namespace that we came from.
"""

import os
import signal
import subprocess
import sys
from types import TracebackType
from typing import Self

SITE_ADDRESS = "10.87.0.1"
RATE = "1gbit"
BURST = "128kb"
QUEUE_LATENCY = "20ms"
_IN_SITE = "BASEFS_BENCH_FLEET_SITE"


def enter_site() -> str:
    """Go on inside a new namespace, the site's, whose name is returned. Does not return in the process that calls it.

    That one waits for the process inside, and takes the namespaces away whatever became of it.
    """
    if name := os.environ.get(_IN_SITE):
        return name
    name = f"basefs-fleet-{os.getpid()}"
    _ip("netns", "add", name)
    try:
        inside = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{name}", sys.executable, *sys.orig_argv[1:]],
            env={**os.environ, _IN_SITE: name},
        )
        signal.signal(signal.SIGTERM, lambda *_: inside.terminate())  # it puts everything away, and we what is left
        code = inside.wait()
    finally:
        for one in _names(name):
            _ip("netns", "delete", one)
    sys.exit(code)


class Network:
    """The site's bridge, and the links of `count` nodes."""

    def __init__(self, site: str, count: int) -> None:
        self._site = site
        self._count = count

    def __enter__(self) -> Self:
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "site", "type", "bridge")
        _ip("address", "add", f"{SITE_ADDRESS}/16", "dev", "site")
        _ip("link", "set", "site", "up")
        for node in range(self._count):
            self._add(node)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for node in range(self._count):
            _ip("netns", "delete", self._name(node))  # and the veth pair with it
        _ip("link", "delete", "site")

    def prefix(self, node: int) -> tuple[str, ...]:
        """What a command begins with that is to run on the node."""
        return ("nsenter", f"--net=/run/netns/{self._name(node)}")

    def _name(self, node: int) -> str:
        return f"{self._site}-{node}"

    def _add(self, node: int) -> None:
        name, here = self._name(node), f"node{node}"
        _ip("netns", "add", name)
        _ip("link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", here, "master", "site", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "address", "add", f"10.87.{1 + node // 200}.{1 + node % 200}/16", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        limit = ("root", "tbf", "rate", RATE, "burst", BURST, "latency", QUEUE_LATENCY)
        subprocess.run(["tc", "qdisc", "add", "dev", here, *limit], check=True)
        subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit], check=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _names(prefix: str) -> list[str]:
    """The namespaces that are still there of a run."""
    return [name for name in os.listdir("/run/netns") if name == prefix or name.startswith(f"{prefix}-")]

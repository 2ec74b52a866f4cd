"""Links as processes: the proxy that stands between a node and the image service, and what crossed it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from tools.bench.peers.link_model import LinkSpec
from tools.mount import ROOT

END_S = 5.0

LOOPBACK = LinkSpec(name="loopback", round_trip_s=0.0, bits_s=None)
GBIT = LinkSpec(name="1 Gbit/s", round_trip_s=0.0, bits_s=1e9)
GBIT_10_MS = LinkSpec(name="1 Gbit/s, 10 ms", round_trip_s=0.010, bits_s=1e9)
SLOW = LinkSpec(name="50 Mbit/s, 20 ms", round_trip_s=0.020, bits_s=50e6)
LINKS = (LOOPBACK, GBIT, GBIT_10_MS, SLOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossed:
    """What has gone over a link: bytes towards the node, and HTTP requests from it."""

    down_bytes: int
    requests: int

    def since(self, earlier: "Crossed") -> "Crossed":
        """The difference."""
        return Crossed(down_bytes=self.down_bytes - earlier.down_bytes, requests=self.requests - earlier.requests)


class Link:
    """A running proxy in front of `target_url`; `url` is where it is reached over the link."""

    def __init__(self, target_url: str, spec: LinkSpec) -> None:
        self.spec = spec
        target = urlsplit(target_url)
        assert target.hostname is not None
        where = [target.hostname, str(target.port), str(spec.round_trip_s), str(spec.bits_s or 0)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench.peers.link_proxy", *where],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.url = f"http://127.0.0.1:{self._answer()['port']}"
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the proxy; connections over it break."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        finally:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def crossed(self) -> Crossed:
        """What has crossed since the start."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        counters = self._answer()
        return Crossed(down_bytes=counters["down_bytes"], requests=counters["requests"])

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the link's proxy ended by itself: what it said is on standard error")
        return json.loads(line)

"""What the figures were made on and with."""

import os
import platform
import statistics
import time
import urllib.request
from importlib.metadata import version

from tools.bench.peers.base import Peer
from tools.bench.peers.peers import first_line
from tools.bench.peers.site import Site

REQUESTS = 40
RANGE_BYTES = 64 << 10


def machine() -> str:
    """Processor, memory and system, on one line."""
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "?")
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "?")
    return f"{os.cpu_count()} cores ({model}), {memory_gib:.0f} GiB, {system}"


def versions(peers: tuple[type[Peer], ...]) -> dict[str, str]:
    """Each peer's, and of what all of them stand on."""
    told = {peer.name: peer.version() for peer in peers}
    return {**told, "qemu": first_line("qemu-system-x86_64", "--version"), "fio": first_line("fio", "--version"),
            "Python": platform.python_version(), "trio": version("trio")}  # fmt: skip


def source_costs(site: Site) -> str:
    """What one range costs at each of the two servers: Glance's answers are made by Python on this machine."""
    urls = {"Glance": site.glance_file(site.blob.image_id)}
    urls["web server"] = f"{site.web_url}/{site.blob.name}"
    told = [f"{name} {_range_s(url) * 1000:.1f} ms" for name, url in urls.items()]
    return f"one range of {RANGE_BYTES >> 10} KiB on loopback: {', '.join(told)} (median of {REQUESTS})"


def _range_s(url: str) -> float:
    seconds = []
    for number in range(REQUESTS):
        first = number * RANGE_BYTES
        request = urllib.request.Request(url, headers={"Range": f"bytes={first}-{first + RANGE_BYTES - 1}"})
        begun = time.perf_counter()
        with urllib.request.urlopen(request, timeout=30) as answer:
            if len(answer.read()) != RANGE_BYTES:
                raise RuntimeError(f"{url} did not answer with the range that it was asked for")
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)

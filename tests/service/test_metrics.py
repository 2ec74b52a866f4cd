"""The metrics of a real mount, as Prometheus reads them."""

import http.client
import mmap
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from basefs.service.metrics_table import METRICS
from tests.conftest import ExpectedWarnings, MountFactory
from tests.semantics.conftest import eventually
from tests.service.promtool import promtool
from tools.mount import BasefsMount
from tools.rig import Rig

ROOT = Path(__file__).parents[2]
IMAGE_BYTES = 3 << 20

Scrape = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def free_port() -> int:
    """A port that is free now, and that the kernel gives nobody who asks for any: there are other tests beside us."""
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, lowest_given)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def get(port: int, path: str = "/metrics", method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def answers(port: int) -> bool:
    try:
        return get(port)[0] == 200
    except OSError:
        return False


def parsed(text: bytes) -> Scrape:
    families = text_string_to_metric_families(text.decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(scrape: Scrape, name: str, **labels: str) -> float:
    return scrape[name, tuple(sorted(labels.items()))]


@pytest.fixture
def image_id(rig: Rig) -> str:
    return rig.upload(os.urandom(IMAGE_BYTES), "metrics", "raw")


@pytest.fixture
def measured(basefs_mount: MountFactory, image_id: str) -> Iterator[tuple[BasefsMount, int]]:
    port = free_port()
    mount = basefs_mount(options={"metrics_listen": f"127.0.0.1:{port}"})
    eventually(lambda: answers(port))
    return mount, port


def test_a_scrape_tells_what_happened_and_satisfies_promtool(measured: tuple[BasefsMount, int], image_id: str) -> None:
    mount, port = measured
    path = mount.path(image_id)
    assert len(path.read_bytes()) == IMAGE_BYTES
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
    finally:
        os.close(fd)
    assert not (mount.mountpoint / ("0" * 40)).exists()
    status, text = get(port)
    assert status == 200
    promtool("check", "metrics", text=text)
    scrape = parsed(text)
    assert value(scrape, "basefs_serving") == 1
    assert value(scrape, "basefs_glance_reachable") == 1
    assert value(scrape, "basefs_keeper_connected") == 1
    assert value(scrape, "basefs_server_restarts_total") == 0
    assert value(scrape, "basefs_image_size_bytes", image_id=image_id) == IMAGE_BYTES
    assert value(scrape, "basefs_image_cached_bytes", image_id=image_id) == IMAGE_BYTES
    assert value(scrape, "basefs_cache_used_bytes") >= IMAGE_BYTES
    assert value(scrape, "basefs_cache_misses_total") >= 1
    assert value(scrape, "basefs_cache_hits_total") >= 1
    assert value(scrape, "basefs_cache_hit_bytes_total") >= 4096
    assert value(scrape, "basefs_glance_requests_total", kind="range", status="206") >= 1
    assert value(scrape, "basefs_glance_received_bytes_total") >= IMAGE_BYTES
    assert value(scrape, "basefs_fuse_request_duration_seconds_count", operation="read") >= 1
    assert value(scrape, "basefs_fuse_errors_total", operation="lookup", errno="ENOENT") == 1
    assert value(scrape, "basefs_log_records_total", level="error") == 0
    assert value(scrape, "basefs_hung_reads") == 0


def test_every_metric_of_the_table_is_in_a_scrape_and_no_other(measured: tuple[BasefsMount, int]) -> None:
    _, port = measured
    told = set(re.findall(r"^# TYPE (\S+) ", get(port)[1].decode(), re.MULTILINE))
    assert {name for name in told if name.startswith("basefs_")} == set(METRICS)


def test_nothing_but_get_metrics_is_answered(measured: tuple[BasefsMount, int]) -> None:
    _, port = measured
    assert get(port, "/")[0] == 404
    assert get(port, "/v1/status")[0] == 404
    assert get(port, method="POST")[0] == 405


def test_the_next_server_has_the_port_at_once(
    measured: tuple[BasefsMount, int], expected_warnings: ExpectedWarnings, kill_server: Callable[[BasefsMount], None]
) -> None:
    mount, port = measured
    expected_warnings(r"basefs.keeper server \d+ died")
    with socket.create_connection(("127.0.0.1", port)):  # a connection that the kernel keeps in TIME_WAIT
        kill_server(mount)
    eventually(lambda: answers(port))
    assert "cannot listen" not in mount.log_text


def test_a_port_that_is_taken_is_one_warning_and_had_once_it_is_free(
    basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(r"no metrics: cannot listen on 127.0.0.1 port \d+: Address already in use; trying again")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        mount = basefs_mount(options={"metrics_listen": f"127.0.0.1:{port}"})
        eventually(lambda: "no metrics" in mount.log_text)
        assert mount.status()["state"] == "serving"
    eventually(lambda: answers(port))
    assert mount.log_text.count("no metrics") == 1


def test_an_empty_address_listens_nowhere(basefs_mount: MountFactory) -> None:
    mount = basefs_mount(options={"metrics_listen": ""})
    inodes = set()
    for pid in mount.pids():
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile: nobody listens on it
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{fd}")))
    listening = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"}
    assert not inodes & listening

"""The link of `make bench-peers` does to bytes what it says: delay, rate, every byte, and it counts."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.bench.peers.link import Link
from tools.bench.peers.link_model import Direction, LinkSpec
from tools.bench.peers.range_server import byte_range
from tools.mount import ROOT

pytestmark = pytest.mark.timed

FILE_BYTES = 3 << 20


@contextmanager
def range_server(directory: Path, *origins: str) -> Iterator[str]:
    argv = [sys.executable, "-m", "tools.bench.peers.range_server", str(directory), *origins]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield "http://127.0.0.1:" + server.stdout.readline().partition(": ")[2].rstrip("}\n")
        finally:
            server.stdin.close()


@pytest.fixture(scope="module")
def data() -> bytes:
    return os.urandom(FILE_BYTES)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("range-server")
    (directory / "file").write_bytes(data)
    with range_server(directory) as url:
        yield url


def connection(link: Link) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", urlsplit(link.url).port, timeout=60)


def get(client: http.client.HTTPConnection, span: str = "") -> bytes:
    client.request("GET", "/file", headers={"Range": span} if span else {})
    return client.getresponse().read()


def seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def best_of(tries: int, measure: Callable[[], float], *, least_s: float) -> float:
    """The shortest of some measurements: a loaded machine only adds to what the link takes. None may be too short."""
    taken = [measure()]
    while taken[-1] > 1.1 * least_s and len(taken) < tries:
        taken.append(measure())
    assert min(taken) >= 0.99 * least_s
    return min(taken)


def test_a_request_takes_the_round_trip_and_a_new_connection_two(server: str) -> None:
    with Link(server, LinkSpec(name="", round_trip_s=0.05, bits_s=None)) as link:
        client = connection(link)
        assert seconds(lambda: get(client, "bytes=0-0")) >= 0.099
        best_s = best_of(50, lambda: seconds(lambda: get(client, "bytes=5-5")), least_s=0.05)
        client.close()
    assert best_s <= 0.055


def test_bytes_come_at_the_rate_whatever_the_number_of_connections(server: str, data: bytes) -> None:
    bits_s = 120e6
    with Link(server, LinkSpec(name="", round_trip_s=0.0, bits_s=bits_s)) as link:

        def three_at_once() -> None:
            clients = [connection(link) for _ in range(3)]
            for client in clients:
                client.request("GET", "/file")
            assert all(client.getresponse().read() == data for client in clients)
            for client in clients:
                client.close()

        least_s = 3 * FILE_BYTES * 8 / bits_s
        best_s = best_of(10, lambda: seconds(three_at_once), least_s=least_s)
    assert best_s <= 1.1 * least_s


def test_what_crosses_is_counted(server: str) -> None:
    with Link(server, LinkSpec(name="", round_trip_s=0.0, bits_s=None)) as link:
        client = connection(link)
        before = link.crossed()
        for _ in range(4):
            get(client, "bytes=0-99999")
        crossed = link.crossed().since(before)
        client.close()
    assert crossed.requests == 4
    assert 400_000 < crossed.down_bytes < 402_000


def test_without_limit_and_delay_every_byte_passes(server: str, data: bytes) -> None:
    with Link(server, LinkSpec(name="", round_trip_s=0.0, bits_s=None)) as link:
        client = connection(link)
        assert [get(client), get(client, "bytes=7-90000"), get(client, "bytes=-9")] == [data, data[7:90001], data[-9:]]
        client.close()


def test_a_server_that_asks_another_passes_on_its_bytes(server: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(FILE_BYTES))  # its size counts, its bytes do not
    with range_server(tmp_path, json.dumps({"file": server + "/file"})) as url:
        client = http.client.HTTPConnection("127.0.0.1", urlsplit(url).port, timeout=60)
        assert [get(client, "bytes=5-6"), get(client), get(client, "bytes=-9")] == [data[5:7], data, data[-9:]]
        client.close()


def test_a_client_that_leaves_in_the_middle_takes_nobody_along(server: str, data: bytes) -> None:
    with Link(server, LinkSpec(name="", round_trip_s=0.001, bits_s=400e6)) as link:
        for _ in range(3):
            leaver = connection(link)
            leaver.request("GET", "/file")
            leaver.getresponse().read(1000)
            leaver.close()
        client = connection(link)
        assert get(client) == data
        client.close()


def test_a_direction_sends_one_after_the_other_and_delays_all() -> None:
    link = Direction(delay_s=0.005, bits_s=8e6)
    assert link.arrival(10.0, 1000) == pytest.approx(10.006)
    assert link.arrival(10.0, 2000) == pytest.approx(10.008)
    assert link.backlog_s(10.001) == pytest.approx(0.002)
    assert link.arrival(20.0, 1000) == pytest.approx(20.006)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1 << 20)), min_size=1), st.floats(1e3, 1e9))
def test_arrivals_keep_their_order_and_the_rate(handed_over: list[tuple[float, int]], bits_s: float) -> None:
    link = Direction(delay_s=0.01, bits_s=bits_s)
    times = sorted(at for at, _ in handed_over)
    arrivals = [link.arrival(at, size) for at, (_, size) in zip(times, handed_over, strict=True)]
    assert arrivals == sorted(arrivals)
    sent_s = sum(size for _, size in handed_over) * 8 / bits_s
    assert arrivals[-1] >= times[0] + sent_s + 0.01 - 1e-6 * (1 + sent_s)
    assert arrivals[-1] <= times[-1] + sent_s + 0.01 + 1e-6 * (1 + sent_s)


@pytest.mark.parametrize(
    ("header", "where"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=5-", (5, 5)),
        ("bytes=5-99", (5, 5)),
        ("bytes=-3", (7, 3)),
        ("bytes=-30", (0, 10)),
        ("bytes=10-", None),
        ("bytes=-0", None),
        ("bytes=-", None),
        ("bytes=4-3", None),
        ("bytes=1-2,4-5", None),
    ],
)
def test_ranges_of_ten_bytes(header: str, where: tuple[int, int] | None) -> None:
    assert byte_range(header, 10) == where

"""What `make bench-peers` promises about peers: turns, limit, bytes, and that nothing is left."""

import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tools.bench.peers.base import Peer, TooLongError, usage_of
from tools.bench.peers.record import Run
from tools.bench.peers.site import Access, Disk, Site
from tools.bench.peers.work import Bench, measure, replay

NOTHING = SimpleNamespace(
    spec=SimpleNamespace(name="link"),
    crossed=lambda: SimpleNamespace(since=lambda _: SimpleNamespace(down_bytes=7, requests=1)),
)
DISK = Disk(name="disk", image_id="", packed_id="", original=Path("/nowhere"))


class Sleeper(Peer):
    """Starts a process that sleeps for ever; each disk it brings is a new file."""

    name = "sleeper"

    @classmethod
    def version(cls) -> str:
        return "1"

    def start(self) -> None:
        self.process = self.spawn("sleep", "infinity")

    def bring(self, disk: Disk, guest: int, limit_s: float) -> Path:
        path = self.directory / f"{disk.name}.{guest}.{threading.get_ident()}"
        path.touch(exist_ok=False)
        return path


class Unshared(Sleeper):
    name = "unshared"
    shares = False


class Failing(Sleeper):
    name = "failing"

    def start(self) -> None:
        super().start()
        self.run("sh", "-c", "echo what is wrong; exit 3")


def made(kind: type[Peer], directory: Path) -> Peer:
    return kind(cast("Access", NOTHING), directory / "peer")


def bench_of(tmp_path: Path, *peers: type[Peer]) -> Bench:
    return Bench(
        site=cast("Site", None), scratch=tmp_path, peers=peers, alternations=3, guest_alternations=2,
        slow_alternations=1, limit_s=5.0, trace=[(0, 1)], say=lambda _: None,
    )  # fmt: skip


def test_a_peer_that_ends_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    with made(Sleeper, tmp_path) as peer:
        (pid,) = peer.pids()
    assert not os.path.exists(f"/proc/{pid}")
    assert list(tmp_path.iterdir()) == []


def test_a_peer_that_fails_to_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    peer = made(Failing, tmp_path)
    with pytest.raises(Exception, match=r"sh exited with 3:(.|\n)*what is wrong"), peer:
        pass
    assert peer.pids() == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_is_brought_once_for_all_guests_or_once_for_each(tmp_path: Path) -> None:
    for kind, files in ((Sleeper, 1), (Unshared, 4)):
        with made(kind, tmp_path) as peer:
            paths: list[Path] = []
            threads = [
                threading.Thread(target=lambda n=n, paths=paths: paths.append(peer.path(DISK, n % 4)))
                for n in range(12)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(paths) == 12
            assert len(set(paths)) == files


def test_who_begins_changes_and_who_was_given_up_is_not_tried_again(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, Sleeper, Unshared)
    order = []
    for alternation, kind in bench.turns(bench.peers, "work", "link", bench.alternations):
        order.append((alternation, kind.name))
        exceeded = (alternation, kind) == (1, Unshared)
        bench.add(
            Run(
                work="work",
                link="link",
                peer=kind.name,
                alternation=alternation,
                value=1.0,
                unit="s",
                exceeded=exceeded,
            )
        )
    assert order == [(0, "sleeper"), (0, "unshared"), (1, "unshared"), (1, "sleeper"), (2, "sleeper")]
    assert [n for n, _ in bench.turns(bench.peers, "other", "link", bench.slow_alternations)] == [0, 0]


def test_a_measurement_says_what_crossed_and_what_was_used(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, Sleeper)
    with made(Sleeper, tmp_path) as peer:
        measure(bench, peer, cast("Access", NOTHING), "work", 2, lambda _: 1.5)
    (run,) = bench.runs
    assert (run.work, run.link, run.peer, run.alternation, run.value) == ("work", "link", "sleeper", 2, 1.5)
    assert (run.fetched_bytes, run.requests, run.exceeded) == (7, 1, False)
    assert run.memory_bytes


def test_what_reaches_the_limit_is_given_up_and_told(tmp_path: Path) -> None:
    def give_up(limit_s: float) -> None:
        assert limit_s == 9.0
        raise TooLongError

    bench = bench_of(tmp_path, Sleeper)
    with made(Sleeper, tmp_path) as peer:
        measure(bench, peer, cast("Access", NOTHING), "work", 0, give_up, limit_s=9.0)
    assert (bench.runs[0].value, bench.runs[0].exceeded) == (9.0, True)


def test_a_replay_compares_bytes_and_ends_at_its_limit(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_bytes(os.urandom(8192))
    wrong.write_bytes(right.read_bytes()[:5000] + b"!!" + right.read_bytes()[5002:])
    trace = [(0, 1), (513, 100), (4096, 4096)]
    replay(right, trace, 60.0, right)
    with pytest.raises(RuntimeError, match="wrong bytes at 4096 of"):
        replay(wrong, trace, 60.0, right)
    with pytest.raises(TooLongError):
        replay(right, trace, -1.0)


def test_usage_is_of_running_processes_and_of_their_ended_children() -> None:
    spin = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"
    argv = ["sh", "-c", f"sh -c '{spin}'; echo; read end"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        usage = usage_of([process.pid])
        process.communicate()
    assert usage.cpu_s > 0
    assert usage.memory_bytes > 100_000
    assert usage_of([process.pid]).memory_bytes == 0

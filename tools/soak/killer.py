"""Something done to a mount again and again while it is used: kill -9, SIGSTOP, eviction, upgrade."""

import contextlib
import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tools.mount import BasefsMount

KILLED_SERVERS_LOG = (
    r"server \d+ died \(signal SIGKILL\)",
    r"the server ended \(signal SIGKILL\) before",
    r"servers died soon after they were handed",
    r"dead servers had taken are handed out again",
    r"the last one that worked goes on: the server ended \(signal SIGKILL\)",
    r"no server can wait in place",
)
"""What a keeper may log while its servers are killed (re.search)."""
_SERVES = re.compile(r" basefs\.keeper server \d+ serves ")


def server_pid(mount: BasefsMount) -> int | None:
    """The server that runs or starts now, as the lock file tells; None in the moment between two."""
    try:
        pid = json.loads((mount.cache_dir / "lock").read_text(encoding="utf-8"))["server_pid"]
    except (OSError, ValueError, KeyError):
        return None
    return pid if isinstance(pid, int) else None


def keeper_pid(mount: BasefsMount) -> int | None:
    """The keeper, as the lock file tells."""
    try:
        pid = json.loads((mount.cache_dir / "lock").read_text(encoding="utf-8"))["keeper_pid"]
    except (OSError, ValueError, KeyError):
        return None
    return pid if isinstance(pid, int) else None


def signal_server(mount: BasefsMount, number: signal.Signals) -> bool:
    """Send the server a signal, also one that starts; False when there was none to send it to."""
    pid = server_pid(mount)
    if pid is None:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class Killer:
    """kill -9 of the server, also of one that starts, but not of two in a row: a loaded machine would never serve."""

    def __init__(self, mount: BasefsMount) -> None:
        self._mount = mount
        self._served_before = -1

    def __call__(self) -> bool:
        """Whether it killed one."""
        served = len(_SERVES.findall(self._mount.log_text))
        if served == self._served_before:
            return False
        self._served_before = served
        return signal_server(self._mount, signal.SIGKILL)


def forget_pages(paths: Sequence[Path]) -> None:
    """Have the kernel forget the clean pages of these files, so that buffered reads ask the server again."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class Again:
    """Calls `act` every `least_s` to `most_s` seconds, in a thread; `done` counts the calls that returned True."""

    def __init__(self, act: Callable[[], bool], *, least_s: float, most_s: float, seed: int) -> None:
        self.done = 0
        self.error: BaseException | None = None
        """What ended it early."""
        self._act = act
        self._spans_s = (least_s, most_s)
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._random.uniform(*self._spans_s)):
                self.done += self._act()
        except BaseException as error:  # noqa: BLE001  (whatever it is, the caller raises it)
            self.error = error

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the act that is under way."""
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def again(act: Callable[[], bool], *, least_s: float, most_s: float, seed: int = 0) -> Iterator[Again]:
    """Do it while the block runs; what ended it early is raised at the end."""
    running = Again(act, least_s=least_s, most_s=most_s, seed=seed)
    running.start()
    try:
        yield running
    finally:
        running.stop()
    if running.error is not None:
        raise running.error

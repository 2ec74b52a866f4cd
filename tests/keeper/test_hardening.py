"""What keeper and server do to themselves at their start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from basefs.hardening import OOM_NEVER, SERVER_OOM_MIN

KEEPER_RSS_MAX_KIB = 15 * 1024
PR_GET_DUMPABLE = 3


def status_of(pid: int) -> dict[str, int]:
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return {fields[0].rstrip(":"): int(fields[1]) for fields in lines if fields[-1] == "kB"}


@pytest.mark.mount
def test_the_keeper_is_locked_in_memory_small_and_does_not_grow(mounting):
    keeper = mounting.start_ready()
    first = status_of(keeper.process.pid)
    for _ in range(3):
        os.kill(mounting.server_pids()[-1], signal.SIGKILL)
        keeper.wait_for_log("again")
    last = status_of(keeper.process.pid)
    print(f"keeper: {last['VmRSS']} KiB resident, {last['VmLck']} KiB locked")
    assert last["VmLck"] >= last["VmRSS"] - 64
    assert last["VmRSS"] <= KEEPER_RSS_MAX_KIB
    assert last["VmRSS"] - first["VmRSS"] <= 512


@pytest.mark.mount
def test_the_keeper_leaves_no_core_file_and_is_killed_after_its_server(mounting):
    keeper = mounting.start_ready()
    limits = Path(f"/proc/{keeper.process.pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if "core file" in line).split()[4:6] == ["0", "0"]
    ours = int(Path("/proc/self/oom_score_adj").read_text())
    server = int(Path(f"/proc/{mounting.server_pids()[-1]}/oom_score_adj").read_text())
    assert server == max(ours, SERVER_OOM_MIN)
    if int(Path(f"/proc/{keeper.process.pid}/oom_score_adj").read_text()) != OOM_NEVER:
        keeper.wait_for_log("not protected when memory runs out")


def test_secrets_reach_no_core_file():
    code = (
        "import ctypes, resource\n"
        "from basefs.hardening import forbid_core_files\n"
        "forbid_core_files()\n"
        f"print(ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "0 (0, 0)\n"


def test_a_server_forbids_them_too_before_it_reads_a_secret():
    source = Path(sys.modules["basefs"].__path__[0], "service", "__main__.py").read_text()
    assert 0 < source.index("    forbid_core_files()") < source.index("= _import_main()()")


def test_memory_that_may_not_be_locked_is_told_and_changes_nothing():
    code = (
        "import logging, os, resource\n"
        "from basefs.hardening import lock_memory\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "lock_memory()\n"
        "print('on')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "on\n"
    assert "memory is not locked" in result.stderr

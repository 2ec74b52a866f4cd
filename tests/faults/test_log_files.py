"""The log is renamed, truncated, full: every record finds the file of that name, and no reader notices."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.semantics.conftest import eventually
from tools.mount import BasefsMount

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "etc" / "logrotate.d" / "basefs"
RECORDS = re.compile(r"^\d{4}-\d\d-\d\d [\d:]{8}\.\d{3} \d+ [A-Z]+ \S+ ", re.MULTILINE)


def make_server_log(mount: BasefsMount, name: str) -> None:
    """A look-up that fails is a record of level DEBUG."""
    assert not (mount.mountpoint / name).exists()


def make_keeper_log(mount: BasefsMount) -> None:
    """A stop that is refused."""
    with (mount.mountpoint / ".basefs" / "status.json").open():
        os.kill(mount.status()["keeper_pid"], signal.SIGTERM)
        eventually(lambda: "not stopped, serving on" in mount.log_text)


@pytest.mark.parametrize("how", ["create 0640 root root", "copytruncate"])
def test_after_logrotate_records_of_server_and_keeper_go_to_the_new_file(
    basefs_mount: MountFactory, tmp_path: Path, expected_warnings: ExpectedWarnings, how: str
) -> None:
    expected_warnings("not stopped, serving on")
    mount = basefs_mount(options={"DEFAULT.debug": True})
    make_server_log(mount, "before")
    eventually(lambda: "b'before'" in mount.log_text)
    text = EXAMPLE.read_text().replace("/var/log/basefs.log", str(mount.log_path))
    conf = tmp_path / "logrotate.conf"
    conf.write_text("su root root\n" + text.replace("create 0640 root root", how))
    subprocess.run(["logrotate", "-f", "-s", tmp_path / "state", conf], check=True)
    old = Path(f"{mount.log_path}.1").read_text()
    make_server_log(mount, "after")
    eventually(lambda: "b'after'" in mount.log_text)
    make_keeper_log(mount)
    assert "b'before'" not in mount.log_text
    assert RECORDS.match(mount.log_text)
    assert Path(f"{mount.log_path}.1").read_text() == old
    assert mount.log_path.stat().st_mode & 0o777 == 0o640


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "basefs-test-log", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_of_the_log_is_no_error_and_records_come_again(basefs_mount: MountFactory, tmp_path: Path) -> None:
    with small_disk(tmp_path / "log") as disk:
        log_file = disk / "basefs.log"
        mount = basefs_mount(options={"DEFAULT.debug": True, "DEFAULT.log_file": log_file})
        ballast = disk / "ballast"
        ballast.touch()
        free = os.statvfs(disk)
        ballast.write_bytes(bytes(free.f_bavail * free.f_frsize))
        for number in range(300):
            make_server_log(mount, f"full{number}")
        assert mount.status()["state"] == "serving"
        ballast.unlink()
        make_server_log(mount, "again")
        eventually(lambda: "b'again'" in log_file.read_text())
        mount.stop()

import contextlib
import json
import os
import select
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from basefs import mounts, processes
from basefs.keeper_setup import lock_holder

pytestmark = pytest.mark.mount


def holder_of(mount) -> dict:
    return lock_holder(mount.cache_dir)


def end_of(pid: int) -> None:
    """Wait until the process has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], 30)[0]
    finally:
        os.close(pidfd)


@pytest.fixture
def mount(basefs_mount):
    return basefs_mount()


def doctor(mount) -> dict[str, dict]:
    done = mount.cli("doctor", "-f", "json", check=False)
    assert done.returncode in (0, 1), done.stderr
    findings = {line["check"]: line for line in json.loads(done.stdout)}
    assert (done.returncode == 1) == any(line["status"] == "error" for line in findings.values())
    return findings


def test_background_returns_when_the_mount_serves(mount):
    assert mount.is_mounted
    assert (mount.mountpoint / ".basefs" / "status.json").exists()
    status = mount.status()
    assert status["mountpoint"] == str(mount.mountpoint)
    assert status["state"] == "serving"
    assert (status["keeper_pid"], status["server_pid"]) == (
        holder_of(mount)["keeper_pid"],
        holder_of(mount)["server_pid"],
    )


def test_background_reports_why_it_cannot_mount(mount, expected_warnings):
    expected_warnings("is in use by another basefs")
    second = mount.cli("mount", "--background", check=False)
    assert second.returncode == 1
    assert second.stderr.startswith("basefs: cache_dir")
    assert f"keeper pid {holder_of(mount)['keeper_pid']}" in second.stderr
    assert second.stderr.count("\n") == 1


def test_foreground_serves_until_a_signal_and_exits_0(basefs_mount):
    mount = basefs_mount(start=False)
    argv = [str(Path(os.sys.executable).with_name("basefs")), "mount", "--config-file", str(mount.conf_path)]
    keeper = subprocess.Popen(argv, stderr=subprocess.PIPE, env=mount.environment)
    with keeper:
        for line in keeper.stderr:
            if b" serves " in line:
                break
        assert holder_of(mount)["keeper_pid"] == keeper.pid
        keeper.send_signal(signal.SIGINT)
        keeper.stderr.read()
        assert keeper.wait(30) == 0
    assert not mount.is_mounted


def test_unmount_returns_when_keeper_and_server_have_ended(mount):
    holder = holder_of(mount)
    mount.cli("unmount")
    assert not mount.is_mounted
    assert not processes.is_running(holder["keeper_pid"])
    assert not processes.is_running(holder["server_pid"])


def test_unmount_of_a_busy_mount_names_who_has_it_open(mount):
    fd = os.open(mount.mountpoint / ".basefs" / "status.json", os.O_RDONLY)
    try:
        done = mount.cli("unmount", check=False)
    finally:
        os.close(fd)
    assert done.returncode == 1
    assert f"(pid {os.getpid()}, {mount.mountpoint}/.basefs/status.json)" in done.stderr
    assert "--lazy" in done.stderr
    assert mount.is_mounted


def test_a_lazy_unmount_serves_on_until_the_last_close(mount):
    holder = holder_of(mount)
    fd = os.open(mount.mountpoint / ".basefs" / "status.json", os.O_RDONLY)
    try:
        done = mount.cli("unmount", "--lazy")
        assert "still served" in done.stderr
        assert not mount.is_mounted
        assert processes.is_running(holder["server_pid"])
    finally:
        os.close(fd)
    end_of(holder["keeper_pid"])


def test_unmount_works_while_the_server_hangs(mount):
    holder = holder_of(mount)
    os.kill(holder["server_pid"], signal.SIGSTOP)
    mount.cli("unmount")
    assert not mount.is_mounted
    assert not processes.is_running(holder["server_pid"])


def test_unmount_works_when_the_keeper_is_dead(mount):
    holder = holder_of(mount)
    os.kill(holder["keeper_pid"], signal.SIGKILL)
    end_of(holder["keeper_pid"])
    mount.cli("unmount")
    assert not mount.is_mounted
    assert not processes.is_running(holder["server_pid"])


def test_unmount_removes_a_dead_mount_that_somebody_uses(mount):
    holder = holder_of(mount)
    fd = os.open(mount.mountpoint / ".basefs" / "status.json", os.O_RDONLY)
    try:
        for name in ("keeper_pid", "server_pid"):
            os.kill(holder[name], signal.SIGKILL)
            end_of(holder[name])
        mount.cli("unmount")
        assert not mount.is_mounted
    finally:
        with contextlib.suppress(OSError):  # the flush at a close fails, too
            os.close(fd)


def test_mount_replaces_a_dead_mount(mount, expected_warnings):
    expected_warnings("left behind when it died")
    holder = holder_of(mount)
    for name in ("keeper_pid", "server_pid"):
        os.kill(holder[name], signal.SIGKILL)
        end_of(holder[name])
    mount.cli("mount", "--background")
    assert mount.status()["state"] == "serving"
    assert [found.mountpoint for found in mounts.mount_table()].count(str(mount.mountpoint)) == 1


def test_a_killed_server_is_replaced_and_the_mount_lives_on(mount, expected_warnings):
    expected_warnings("died .signal SIGKILL")
    holder = holder_of(mount)
    os.kill(holder["server_pid"], signal.SIGKILL)
    assert json.loads((mount.mountpoint / ".basefs" / "status.json").read_text())["state"]
    assert mount.status()["server_pid"] not in (holder["server_pid"], None)
    assert mount.status()["keeper_pid"] == holder["keeper_pid"]


def test_doctor_finds_everything_well(mount, rig):
    rig.upload(b"x" * 200_000, "for the doctor")
    findings = doctor(mount)
    assert [line for line in findings.values() if line["status"] == "error"] == []
    for check in ("configuration", "/dev/fuse", "mount", "mount answers", "keeper", "server", "control socket"):
        assert findings[check]["status"] == "ok", findings[check]
    for check in ("glance identity", "glance", "ranges"):
        assert findings[check]["status"] == "ok", findings[check]
    assert "holds 0 names" in findings["lower directory"]["detail"]


def test_doctor_without_a_mount_says_how_to_make_one(basefs_mount):
    findings = doctor(basefs_mount(start=False))
    assert findings["mount"]["status"] == "warning"
    assert "basefs mount" in findings["mount"]["detail"]


def test_doctor_sees_a_glance_that_is_away(basefs_mount):
    away = "[glance]\nauth_type = none\nendpoint_override = http://127.0.0.1:1\n"
    findings = doctor(basefs_mount(away, start=False))
    assert findings["glance"]["status"] == "error"
    assert "check that Glance runs" in findings["glance"]["detail"]
    assert "ranges" not in findings


def test_status_and_doctor_tell_of_a_server_that_hangs(basefs_mount):
    """Side by side: both wait for it."""
    mount = basefs_mount(options={"watchdog_s": 600.0})
    status = mount.status()
    os.kill(status["server_pid"], signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(2) as pool:
            asked, examined = pool.submit(mount.status), pool.submit(doctor, mount)
            found, findings = asked.result(), examined.result()
    finally:
        os.kill(status["server_pid"], signal.SIGCONT)
    assert (found["state"], found["server_pid"]) == ("serving", status["server_pid"])
    assert "hangs" in found["server_error"]
    assert findings["mount answers"]["status"] == "error"
    assert "hangs" in findings["mount answers"]["detail"]
    assert findings["control socket"]["status"] == "error"
    assert findings["keeper"]["status"] == "ok"


def test_doctor_sees_a_dead_mount(mount):
    holder = holder_of(mount)
    for name in ("keeper_pid", "server_pid"):
        os.kill(holder[name], signal.SIGKILL)
        end_of(holder[name])
    findings = doctor(mount)
    assert "not connected" in findings["mount answers"]["detail"]
    assert {findings[check]["status"] for check in ("mount answers", "keeper", "server", "control socket")} == {"error"}


def test_doctor_reports_a_bad_configuration_and_goes_on(basefs_mount):
    mount = basefs_mount(options={"nonsense": 1}, start=False)
    findings = doctor(mount)
    assert "unknown key nonsense" in findings["configuration"]["detail"]
    assert findings["kernel"]["status"] in ("ok", "warning")


def test_upgrade_tells_what_it_did(mount):
    before = mount.status()
    done = mount.cli("upgrade", "-f", "json", timeout_s=120)
    answer = json.loads(done.stdout)
    assert answer["upgraded"] is True
    assert answer["old_pid"] == before["server_pid"]
    assert mount.status()["server_pid"] == answer["serving_pid"] == holder_of(mount)["server_pid"]


def test_upgrade_without_a_keeper_says_what_is_wrong(mount):
    mount.unmount()
    done = mount.cli("upgrade", check=False)
    assert done.returncode == 1
    assert "no keeper answers" in done.stderr

"""etc/systemd/basefs.service: what systemd itself says of it, and what the keeper relies on."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from basefs.keeper import PARKED_EXIT_CODE
from basefs.keeper_fd_store import HELD_MAX
from basefs.keeper_session_store import PARTS

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "etc/systemd/basefs.service"
DROP_IN = ROOT / "etc/systemd/nova-compute.service.d/basefs.conf"
NAMESPACES = re.compile(
    r"^(Protect\w+|Private\w+|Read\w+Paths|Root\w+|Inaccessible\w+|Bind\w*Paths|Mount\w+)=", re.MULTILINE
)


def settings() -> dict[str, str]:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and line[0] not in "#["]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("basefs")
    copy = tmp_path / "basefs.service"
    copy.write_text(UNIT.read_text().replace("/opt/basefs/bin/basefs", str(program)))
    result = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    complaints = [line for line in result.stderr.splitlines() if "basefs" in line]
    assert (result.returncode, complaints) == (0, [])


def test_the_unit_is_what_the_keeper_relies_on() -> None:
    unit = settings()
    assert int(unit["FileDescriptorStoreMax"]) >= HELD_MAX + len(PARTS)
    assert unit["RestartForceExitStatus"] == unit["SuccessExitStatus"] == str(PARKED_EXIT_CODE)
    expected = {
        "Type": "notify",
        "NotifyAccess": "main",
        "Restart": "on-failure",
        "KillMode": "process",
        "SendSIGKILL": "no",
        "OOMPolicy": "continue",
        "OOMScoreAdjust": "-1000",
        "StartLimitIntervalSec": "0",
        "RuntimeDirectoryPreserve": "yes",
    }
    assert {name: unit[name] for name in expected} == expected
    assert unit["ExecStop"].endswith("unmount --for-systemd %n")
    assert unit["ExecReload"].endswith("upgrade")


def test_the_mount_is_seen_outside_the_unit() -> None:
    assert NAMESPACES.findall(UNIT.read_text()) == []


@pytest.mark.parametrize("path", [UNIT, DROP_IN])
def test_no_unit_depends_on_another_for_its_life(path: Path) -> None:
    assert not re.search(r"^(Requires|Requisite|BindsTo|PartOf|Upholds)=", path.read_text(), re.MULTILINE)


def test_it_comes_before_whoever_takes_over_mounts_or_fills_base() -> None:
    assert {"libvirtd.service", "virtqemud.service", "nova-compute.service"} <= set(settings()["Before"].split())
    assert "Wants=basefs.service\nAfter=basefs.service" in DROP_IN.read_text()


def test_there_is_no_second_version_of_the_unit_in_the_documents() -> None:
    for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md"):
        assert "[Service]" not in path.read_text(), path

"""Builds the Debian 12 disk by debootstrap and mkfs.ext4 -d, from the mirror that apt uses on this machine."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SUITE = "bookworm"
PACKAGES = "linux-image-cloud-amd64,systemd-sysv,udev,iproute2"
DISK_BYTES = 3 << 30
PAYLOAD_BYTES = 32 << 20
PAYLOAD_PATH = "usr/share/basefs-guest/payload"
READY_MARKER = "BASEFS-GUEST-READY"
CHECK_MARKER = "BASEFS-GUEST-SHA256"
# Fixed, so that two builds from the same packages differ in little more than time stamps.
FS_UUID = "ba5ef500-0000-4000-8000-000000000001"

_REPORT = f"""#!/bin/sh
# Says on the serial console that the boot is done; checks the payload and powers off if the kernel command line asks.
exec > /dev/ttyS0 2>&1
echo "{READY_MARKER} $(cut -d' ' -f1 /proc/uptime)"
if grep -qw basefs.check /proc/cmdline; then
    echo "{CHECK_MARKER} $(sha256sum < /{PAYLOAD_PATH} | cut -d' ' -f1)"
fi
if grep -qw basefs.poweroff /proc/cmdline; then
    systemctl --no-block poweroff
fi
"""

_UNIT = """[Unit]
Description=Report that the boot is done
DefaultDependencies=no
After=multi-user.target
Conflicts=shutdown.target

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/basefs-guest-report

[Install]
WantedBy=multi-user.target
"""


class GuestBuildError(Exception):
    """The image could not be built; the message names the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A built guest."""

    disk: Path
    kernel: Path
    initrd: Path
    payload_sha256: str


def build(cache_dir: Path | None = None) -> Guest:
    """Return the guest, built now (about two minutes) if this source has not built it yet.

    Needs root, debootstrap and a Debian mirror in apt's sources. Safe to call from several processes.
    """
    cache = cache_dir or ROOT / ".cache" / "guest"
    cache.mkdir(parents=True, exist_ok=True)
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    done = cache / recipe
    with _locked(cache / "lock"):
        if not done.is_dir():
            for old in [*cache.glob("building-*"), *(d for d in cache.iterdir() if _is_build(d))]:
                shutil.rmtree(old)
            scratch = cache / f"building-{recipe}"
            scratch.mkdir()
            _build(scratch, cache / "debootstrap.log")
            scratch.rename(done)
    return Guest(
        disk=done / "debian12.raw",
        kernel=done / "vmlinuz",
        initrd=done / "initrd.img",
        payload_sha256=hashlib.sha256(_payload()).hexdigest(),
    )


def _is_build(path: Path) -> bool:
    return (path / "debian12.raw").exists()


def _build(scratch: Path, log_path: Path) -> None:
    tree = scratch / "tree"
    mirror, proxy = apt_mirror()
    with open(log_path, "wb") as log:
        argv = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(tree), mirror]
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C", **proxy}
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, check=False)
    if done.returncode:
        raise GuestBuildError(f"debootstrap exited with {done.returncode}, see {log_path}")
    _furnish(tree)
    shutil.copyfile(_only(tree / "boot", "vmlinuz-*"), scratch / "vmlinuz")
    shutil.copyfile(_only(tree / "boot", "initrd.img-*"), scratch / "initrd.img")
    disk = scratch / "debian12.raw"
    with open(disk, "wb") as raw:
        raw.truncate(DISK_BYTES)
    mkfs = ["mkfs.ext4", "-q", "-d", str(tree), "-U", FS_UUID, "-E", f"hash_seed={FS_UUID},root_owner=0:0", str(disk)]
    subprocess.run(mkfs, check=True, stdin=subprocess.DEVNULL)
    shutil.rmtree(tree)


def _furnish(tree: Path) -> None:
    """Turn the fresh tree into a guest that boots quietly and reports on its serial console."""
    _write(tree / "etc/fstab", "/dev/vda / ext4 defaults 0 1\n")
    _write(tree / "etc/hostname", "basefs-guest\n")
    _write(tree / "etc/machine-id", "ba5ef500000040008000000000000001\n")
    _write(tree / "usr/local/sbin/basefs-guest-report", _REPORT, mode=0o755)
    _write(tree / "etc/systemd/system/basefs-guest-report.service", _UNIT)
    wants = tree / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    (wants / "basefs-guest-report.service").symlink_to("/etc/systemd/system/basefs-guest-report.service")
    # A getty on the console would hang up the line while the report is being written.
    (tree / "etc/systemd/system/serial-getty@ttyS0.service").symlink_to("/dev/null")
    payload = tree / PAYLOAD_PATH
    payload.parent.mkdir(parents=True)
    payload.write_bytes(_payload())
    for used_once in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(tree / used_once)
        (tree / used_once / "partial").mkdir(parents=True)


def _payload() -> bytes:
    return hashlib.shake_256(b"basefs guest payload").digest(PAYLOAD_BYTES)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def _only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise GuestBuildError(f"{len(found)} files like {pattern} in {directory}: one was expected")
    return found[0]


def apt_mirror() -> tuple[str, dict[str, str]]:
    """Return where apt takes this suite's main archive from, and the proxy variables it would need."""
    fields = ["apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", "Identifier: Packages"]
    listed = subprocess.run(fields, check=True, capture_output=True, text=True).stdout.splitlines()
    mirrors = [line.split()[2] for line in listed if line.split()[:2] == [SUITE, "main"]]
    if not mirrors:
        raise GuestBuildError(f"apt has no source for {SUITE} main: the guest is built from it")
    dumped = subprocess.run(["apt-config", "dump", "--format", "%F %v%n"], check=True, capture_output=True, text=True)
    settings = dict(line.partition(" ")[::2] for line in dumped.stdout.splitlines())
    proxies = {
        f"{scheme}_proxy": settings[f"Acquire::{scheme}::Proxy"]
        for scheme in ("http", "https")
        if settings.get(f"Acquire::{scheme}::Proxy")
    }
    return mirrors[0], proxies


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

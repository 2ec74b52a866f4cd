"""Boots the guest under qemu (TCG, so it needs no KVM) and reads its serial console."""

import os
import re
import select
import subprocess
import time
from dataclasses import dataclass

from tools.guest.build import CHECK_MARKER, READY_MARKER, Guest

PathLike = str | os.PathLike[str]
MEMORY_MIB = 1024


class BootError(Exception):
    """The guest did not come up, or did not power off, in time; the message ends with its console."""


class BootTimeoutError(BootError):
    """It took too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootResult:
    """What one boot was like. Seconds are wall-clock, from qemu's start."""

    ready_s: float
    total_s: float
    payload_sha256: str | None
    console: str


def create_overlay(base: PathLike, overlay: PathLike) -> None:
    """Make a qcow2 overlay on a raw base, as nova does."""
    options = f"backing_file={os.path.abspath(base)},backing_fmt=raw"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(overlay)]
    subprocess.run(argv, check=True, capture_output=True)


def qemu_argv(
    overlay: PathLike, kernel: PathLike, initrd: PathLike, command_line: str, drive_options: str = ""
) -> list[str]:
    """Return the command that boots `overlay` with cache=none, as nova's default has it."""
    return [
        *("qemu-system-x86_64", "-accel", "tcg", "-m", str(MEMORY_MIB), "-smp", "1"),
        *("-nographic", "-vga", "none", "-nic", "none", "-no-reboot", "-monitor", "none", "-serial", "stdio"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", command_line),
        *("-drive", ",".join(filter(None, [f"file={overlay},format=qcow2,if=virtio,cache=none", drive_options]))),
    ]


def boot(
    overlay: PathLike,
    guest: Guest,
    *,
    timeout_s: float = 240.0,
    check: bool = False,
    drive_options: str = "",
    power_off: bool = True,
    env: dict[str, str] | None = None,
) -> BootResult:
    """Boot `overlay` to multi-user.target; there the guest powers itself off, or is killed if not `power_off`.

    With `check` it first reads its payload, 32 MiB, and `payload_sha256` is what it read. BootError after `timeout_s`,
    or when qemu ended without the guest's ready marker; qemu is gone in every case.
    """
    command_line = (
        "root=/dev/vda rw console=ttyS0 quiet net.ifnames=0" + " basefs.poweroff" * power_off + " basefs.check" * check
    )
    begun = time.monotonic()
    process = subprocess.Popen(
        qemu_argv(overlay, guest.kernel, guest.initrd, command_line, drive_options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
    )
    try:
        console, ready_s = _read_console(process, begun, timeout_s, to_its_end=power_off)
        if not power_off:
            process.kill()
        process.wait(timeout_s)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    checked = re.search(CHECK_MARKER + r" ([0-9a-f]{64})", console)
    if ready_s is None or (power_off and process.returncode) or (check and checked is None):
        raise BootError(f"the guest did not boot; qemu exited with {process.returncode}; console:\n{console[-3000:]}")
    return BootResult(
        ready_s=ready_s,
        total_s=time.monotonic() - begun,
        payload_sha256=checked[1] if checked else None,
        console=console,
    )


def _read_console(
    process: "subprocess.Popen[bytes]", begun: float, timeout_s: float, *, to_its_end: bool
) -> tuple[str, float | None]:
    """Return all that came until qemu closed its output, or the guest was ready; and when that was."""
    assert process.stdout is not None
    fd, console, ready_s = process.stdout.fileno(), b"", None
    while True:
        left_s = begun + timeout_s - time.monotonic()
        if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
            raise BootTimeoutError(
                f"the guest took longer than {timeout_s:.0f} s; console:\n{console[-3000:].decode(errors='replace')}"
            )
        data = os.read(fd, 65536)
        if not data:
            return console.decode(errors="replace"), ready_s
        console += data
        if ready_s is None and READY_MARKER.encode() in console:
            ready_s = time.monotonic() - begun
            if not to_its_end:
                return console.decode(errors="replace"), ready_s

"""A qcow2 file becomes a raw one: `qemu-img convert`, as nova calls it (`nova/privsep/qemu.py: convert_image`).

Both files are named by fds that the child inherits, so it reads and writes these files and no other, whatever becomes
of their names: one that outlives its server can spoil nothing that the next server makes.
"""

import subprocess
import sys

import trio

from basefs import errors

ADDRESS_SPACE_BYTES = 2 << 30
"""nova's `[libvirt] images_address_space_limit`. A convert with 2 MiB clusters ran with 300 MiB (qemu 7.2)."""
CPU_BASE_S = 60
CPU_BYTES_S = 8 << 20
"""nova gives 30 s of CPU to `qemu-img info` and no limit to a convert; ours grows with the disk: a core inflates
some 250 MiB/s (64 KiB in 0.25 ms)."""
SAID_BYTES_MAX = 500


async def convert(source_fd: int, part_fd: int, *, shown_size: int, is_direct: bool) -> None:
    """Write the disk in `source_fd` (qcow2) to `part_fd`, sparse.

    Raises:
        CacheError: qemu-img failed; the message has what it said.
    Cancellation: at any time; the child is killed.
    """
    command = [
        sys.executable, "-P", "-m", "oslo_concurrency.prlimit",
        f"--as={ADDRESS_SPACE_BYTES}", f"--cpu={CPU_BASE_S + shown_size // CPU_BYTES_S}", "--",
        "env", "LC_ALL=C", "LANG=C", "qemu-img", "convert", "-t", "none" if is_direct else "writeback",
        "-O", "raw", "-f", "qcow2", f"/proc/self/fd/{source_fd}", f"/proc/self/fd/{part_fd}",
    ]  # fmt: skip
    try:
        done = await trio.run_process(
            command,
            pass_fds=(source_fd, part_fd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            capture_stderr=True,
            check=False,
            deliver_cancel=_kill,
        )
    except OSError as exc:
        raise errors.CacheError(f"qemu-img cannot be started: {exc}") from exc
    if done.returncode:
        said = " ".join(done.stderr[-SAID_BYTES_MAX:].decode("utf-8", "replace").split())
        raise errors.CacheError(f"qemu-img convert ended with {done.returncode}: {said or 'it said nothing'}")


async def _kill(process: trio.Process) -> None:
    process.kill()

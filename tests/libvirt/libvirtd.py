"""A libvirtd of its own for a test, as a compute node runs it, with nothing of the machine's libvirt touched.

As root libvirtd's paths are compiled in. So it runs in a mount namespace where `/etc/libvirt`, `/run`, `/var/lib`,
`/var/log` and `/var/cache` are empty tmpfs, and nova's `/var/lib/nova/instances` is a directory of the test's. It also
has PID and network namespaces of its own: their first process reads a pipe from the test and ends with it, however
the test ends; the kernel then ends all the others and takes the mounts away.
"""

import os
import select
import shlex
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

INSTANCES = Path("/var/lib/nova/instances")
BASE = INSTANCES / "_base"
# Debian's numbers for the user and the group libvirt-qemu, which only its package libvirt-daemon-system makes.
QEMU_UID = 64055
QEMU_GID = 64055
COMMAND_DEADLINE_S = 60.0

_PID_FILE = "/run/libvirtd.pid"
_LOG_FILE = "/var/log/libvirt/libvirtd.log"

_LIBVIRTD_CONF = f"""
unix_sock_dir = "/run/libvirt"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "1:file:{_LOG_FILE}"
log_filters = "1:security"
log_level = 3
"""

# The DAC driver with dynamic ownership is what chowns the base. Logs go to plain files: no virtlogd.
_QEMU_CONF = """
user = "libvirt-qemu"
group = "libvirt-qemu"
dynamic_ownership = 1
security_driver = "none"
stdio_handler = "file"
"""

_SETUP = f"""
set -e
mount -t proc proc /proc
for directory in /etc/libvirt /run /var/lib /var/log /var/cache; do
    mount -t tmpfs -o mode=755 tmpfs $directory
done
umount --recursive --lazy /sys/fs/cgroup
if [ -e /dev/kvm ]; then    # that only root may use it as here makes libvirt probe qemu a dozen times a definition
    cp --archive /dev/kvm /run/kvm
    chmod 666 /run/kvm
    mount --bind /run/kvm /dev/kvm
fi
mkdir -p /run/lock /var/log/libvirt /var/cache/libvirt /var/lib/libvirt {INSTANCES}
mount --rbind "$INSTANCES" {INSTANCES}
# Copies of other mounts would keep them alive when they are unmounted where they belong.
grep ' - fuse.basefs ' /proc/self/mountinfo | cut -d ' ' -f 5 | grep -v '^{INSTANCES}/' | xargs -r umount -i -c -l
add() {{
    grep -q "^libvirt-qemu:" /etc/$1 && return
    cp /etc/$1 /run/$1
    echo $2 >> /run/$1
    mount --bind /run/$1 /etc/$1
}}
add passwd libvirt-qemu:x:{QEMU_UID}:{QEMU_GID}:::/usr/sbin/nologin
add group libvirt-qemu:x:{QEMU_GID}:
printf '%s' "$LIBVIRTD_CONF" > /etc/libvirt/libvirtd.conf
printf '%s' "$QEMU_CONF" > /etc/libvirt/qemu.conf
echo ready
# Children of a process that ignores SIGCHLD are reaped by the kernel: daemons leave theirs to this one.
exec env --ignore-signal=CHLD cat > /dev/null
"""


class CommandFailedError(Exception):
    """A command inside the namespaces ended with an error; the text has what it said."""


class Libvirt:
    """A libvirtd and its namespaces; commands run inside, where nova's paths are."""

    def __init__(self, namespace_pid: int, instances: Path) -> None:
        self._namespace_pid = namespace_pid
        self._instances = instances
        self._daemon: subprocess.Popen[bytes] | None = None

    def run(self, *command: str) -> str:
        """What the command wrote to its standard output.

        Raises:
            CommandFailedError: It ended with an error.
            subprocess.TimeoutExpired: It took longer than `COMMAND_DEADLINE_S`.
        """
        ended = subprocess.run(self._inside(*command), capture_output=True, text=True, timeout=COMMAND_DEADLINE_S)
        if ended.returncode != 0:
            raise CommandFailedError(f"{shlex.join(command)}: {ended.returncode}: {ended.stderr.strip()}")
        return ended.stdout

    def virsh(self, *arguments: str) -> str:
        """What virsh wrote; errors as in `run`."""
        return self.run("virsh", "--quiet", "--connect", "qemu:///system", *arguments)

    def outside(self, path: Path) -> Path:
        """Where the test finds a file that is under `INSTANCES` inside."""
        return self._instances / path.relative_to(INSTANCES)

    def log(self) -> str:
        """The daemon's log from its first start on."""
        return self.run("cat", _LOG_FILE)

    def start(self) -> None:
        """Returns when the daemon takes connections.

        Raises:
            CommandFailedError: It ended instead; the text has its log.
        """
        with _notify_socket(self._instances / "notify") as notify:
            command = ("env", f"NOTIFY_SOCKET={INSTANCES}/notify", "libvirtd", "--pid-file", _PID_FILE)
            self._daemon = subprocess.Popen(self._inside(*command), stdin=subprocess.DEVNULL)
            death = os.pidfd_open(self._daemon.pid)
            try:
                ready, _, _ = select.select([notify.fileno(), death], [], [], COMMAND_DEADLINE_S)
            finally:
                os.close(death)
        if death in ready:
            raise CommandFailedError(f"libvirtd: {self.log()}")

    def stop(self) -> None:
        """Ends the daemon as `systemctl stop` does; its domains go on running."""
        self.run("sh", "-c", f"kill -TERM $(cat {_PID_FILE})")
        self.wait_for_end()

    def wait_for_end(self) -> None:
        """Returns when the daemon has ended, by `stop` or with its namespaces."""
        if self._daemon is not None:
            self._daemon.wait(COMMAND_DEADLINE_S)

    def _inside(self, *command: str) -> list[str]:
        return ["nsenter", "--target", str(self._namespace_pid), "--mount", "--net", "--pid", "--", *command]


@contextmanager
def libvirtd(instances: Path) -> Iterator[Libvirt]:
    """A daemon that sees the directory `instances`, and what is mounted below it now, as nova's instances_path.

    At the end all its domains are gone too, at once and without their shutdown.
    """
    source = {"LIBVIRTD_CONF": _LIBVIRTD_CONF, "QEMU_CONF": _QEMU_CONF, "INSTANCES": str(instances)}
    unshare = ["unshare", "--mount", "--propagation", "slave", "--net", "--pid", "--fork", "--kill-child"]
    holder = subprocess.Popen(
        [*unshare, "sh", "-c", _SETUP],
        env=os.environ | source,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with ExitStack() as undo:
        undo.callback(holder.wait, COMMAND_DEADLINE_S)
        undo.callback(holder.stdout.close)
        undo.callback(holder.stdin.close)
        if holder.stdout.readline() != b"ready\n":
            raise CommandFailedError("the namespaces could not be set up")
        libvirt = Libvirt(_only_child(holder.pid), instances)
        undo.callback(libvirt.wait_for_end)
        undo.callback(holder.stdin.close)
        libvirt.start()
        yield libvirt


def _only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@contextmanager
def _notify_socket(path: Path) -> Iterator[socket.socket]:
    """A socket that systemd's readiness protocol can reach at `path`, however long the path is."""
    directory = os.open(path.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(f"/proc/self/fd/{directory}/{path.name}")
            yield notify
    finally:
        path.unlink(missing_ok=True)
        os.close(directory)

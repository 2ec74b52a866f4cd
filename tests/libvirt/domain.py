"""One instance as nova makes it: a directory, an overlay on the base, a domain of the XML nova writes; its console."""

import os
import re
import socket
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from tests.libvirt.libvirtd import BASE, INSTANCES, Libvirt

ANSWER_DEADLINE_S = 40.0  # a pass over a cold image of some MiB, on a busy machine

# What nova 34 writes for virt_type=qemu with the default disk_cachemodes, without the parts that have no disk in them.
# Its serial port goes to a socket that the test can read; nova's is a pty with a log.
_DOMAIN_XML = """
<domain type="qemu">
  <uuid>{uuid}</uuid>
  <name>{name}</name>
  <memory>65536</memory>
  <vcpu>1</vcpu>
  <os>
    <type machine="pc">hvm</type>
    <boot dev="hd"/>
  </os>
  <features>
    <acpi/>
    <apic/>
  </features>
  <clock offset="utc"/>
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2" cache="none"/>
      <source file="{disk}"/>
      <target dev="vda" bus="virtio"/>
    </disk>
    <serial type="unix">
      <source mode="bind" path="{console}"/>
    </serial>
    <memballoon model="none"/>
  </devices>
</domain>
"""


class Domain:
    """An instance with its overlay; paths are those inside the namespaces of `libvirt`."""

    def __init__(self, libvirt: Libvirt, uuid: UUID, base_name: str) -> None:
        self.libvirt = libvirt
        self.name = f"instance-{uuid.hex[:8]}"
        self.base = BASE / base_name
        self.directory = INSTANCES / str(uuid)
        self.disk = self.directory / "disk"
        self._xml = _DOMAIN_XML.format(uuid=uuid, name=self.name, disk=self.disk, console=self.directory / "console")

    def create(self) -> None:
        """Makes the directory and the overlay as nova does, and defines the domain."""
        self.outside(self.directory).mkdir()
        self.make_overlay(self.disk)
        self.define()

    def make_overlay(self, path: Path) -> None:
        """`qemu-img create` with the arguments of nova's create_image."""
        backing = f"backing_file={self.base},backing_fmt=raw"
        self.libvirt.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", backing, str(path))

    def define(self) -> None:
        """Writes the persistent definition, as nova's write_instance_config."""
        self.outside(self.directory / "libvirt.xml").write_text(self._xml)
        self.virsh("define", str(self.directory / "libvirt.xml"), name_first=False)

    def virsh(self, verb: str, *arguments: str, name_first: bool = True) -> str:
        """`virsh verb <this domain> arguments`."""
        return self.libvirt.virsh(verb, *((self.name, *arguments) if name_first else arguments))

    def state(self) -> str:
        """As virsh domstate says: running, paused, shut off."""
        return self.virsh("domstate").strip()

    def qemu_pid(self) -> int:
        """The pid of its qemu in the PID namespace."""
        return int(self.libvirt.run("cat", f"/run/libvirt/qemu/{self.name}.pid"))

    def outside(self, path: Path) -> Path:
        """Where the test finds a file of the instance."""
        return self.libvirt.outside(path)

    def console(self) -> "Console":
        """A new connection to its serial port; the last one must be closed."""
        return Console(self.outside(self.directory / "console"))

    def remove(self) -> None:
        """Takes away what is left of it in libvirt, whatever its state."""
        if self.name not in self.libvirt.virsh("list", "--all", "--name").split():
            return
        if self.state() != "shut off":
            self.virsh("destroy")
        if self.name in self.libvirt.virsh("list", "--all", "--name").split():
            self.virsh("undefine", "--managed-save")


class GuestDiskError(Exception):
    """The guest's BIOS reported a failed disk access."""


class Console:
    """The serial port of the guest in `boot_sector`."""

    def __init__(self, path: Path) -> None:
        # Through a directory fd: pytest's directories are too deep for a socket's address.
        directory = os.open(path.parent, os.O_PATH)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_DEADLINE_S)
        try:
            self._socket.connect(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)

    def begin_pass(self) -> None:
        """Waits until the guest waits for us, then tells it to go."""
        while b"." not in self._receive():
            pass
        self._socket.send(b"x")

    def end_pass(self) -> tuple[int, int]:
        """The number of the pass (1 = first since it booted) and the hash of all it read.

        Raises:
            GuestDiskError: The disk failed the guest.
            TimeoutError: No answer within `ANSWER_DEADLINE_S`.
        """
        said = b""
        while not said.endswith(b"\n"):
            said += self._receive(1)
        line = said.decode("ascii").lstrip(".").strip()
        answer = re.fullmatch(r"P([0-9a-f]{8}) S([0-9a-f]{8})", line)
        if answer is None:
            raise GuestDiskError(line)
        return int(answer[1], 16), int(answer[2], 16)

    def make_pass(self) -> tuple[int, int]:
        """`begin_pass` and `end_pass`."""
        self.begin_pass()
        return self.end_pass()

    def _receive(self, size: int = 4096) -> bytes:
        received = self._socket.recv(size)
        if not received:
            raise ConnectionError("qemu closed the serial port")
        return received

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

"""A real libvirtd and its qemu over the mount: all that nova has them do to an instance (nova-contract, section 5)."""

import os
import re
from collections.abc import Callable

import pytest

from tests.libvirt.boot_sector import SECTOR_BYTES
from tests.libvirt.conftest import Base
from tests.libvirt.domain import Domain
from tests.libvirt.libvirtd import QEMU_GID, QEMU_UID, Libvirt
from tools.mount import BasefsMount

pytestmark = [pytest.mark.libvirt, pytest.mark.mount, pytest.mark.glance]


def assert_no_complaints(libvirt: Libvirt, base: Base) -> None:
    """The daemon's log names the base in no warning and no error."""
    complaints = [line for line in libvirt.log().splitlines() if base.path.name in line and ": debug :" not in line]
    assert complaints == []


def test_a_guest_reads_each_byte_of_a_cold_base_right(domain: Domain, base: Base) -> None:
    with domain.console() as console:
        assert console.make_pass() == (1, base.image.pass_hash)
        assert console.make_pass() == (2, base.image.pass_hash)
    assert_no_complaints(domain.libvirt, base)


def test_two_guests_read_one_cold_base_at_once(new_domain: Callable[[], Domain], base: Base) -> None:
    first, second = new_domain(), new_domain()
    first.virsh("start")
    second.virsh("start")
    with first.console() as one, second.console() as other:
        one.begin_pass()
        other.begin_pass()
        assert one.end_pass() == other.end_pass() == (1, base.image.pass_hash)


def test_the_guests_writes_go_to_the_overlay_and_none_to_the_base(domain: Domain, base: Base) -> None:
    with domain.console() as console:
        console.make_pass()
        console.make_pass()
    domain.virsh("destroy")
    whole = domain.directory / "whole.raw"
    domain.libvirt.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(domain.disk), str(whole))
    expected = base.image.after_pass(2)
    padding = bytes(-len(expected) % SECTOR_BYTES)  # a disk is whole sectors, and the last one's rest is zero
    assert domain.outside(whole).read_bytes() == expected + padding
    assert base.path.read_bytes() == base.image.content


def test_qemu_runs_in_its_own_mount_namespace_and_holds_the_base_read_only_direct_and_locked(
    domain: Domain, base: Base
) -> None:
    process = f"/proc/{domain.qemu_pid()}"
    namespaces = domain.libvirt.run("readlink", f"{process}/ns/mnt", "/proc/1/ns/mnt").split()
    assert len(set(namespaces)) == 2
    fds = domain.libvirt.run("find", f"{process}/fd", "-lname", str(domain.base)).split()
    assert len(fds) == 1
    info = domain.libvirt.run("cat", f"{process}/fdinfo/{os.path.basename(fds[0])}")
    flags = int(dict(line.split(None, 1) for line in info.splitlines())["flags:"], 8)
    assert flags & os.O_ACCMODE == os.O_RDONLY
    assert flags & os.O_DIRECT
    locks = re.findall(r"OFDLCK\s+ADVISORY\s+READ .* (\d+) \d+$", info, re.MULTILINE)
    assert locks, "qemu asked for its locks and the mount did not give them"
    assert f"\nUid:\t{QEMU_UID}\t" in domain.libvirt.run("cat", f"{process}/status")


def test_dynamic_ownership_gives_the_base_to_the_qemu_user_and_leaves_it_there(
    new_domain: Callable[[], Domain], base: Base
) -> None:
    domain = new_domain()
    assert base.path.stat().st_uid != QEMU_UID
    domain.virsh("start")
    while_running = base.path.stat()
    assert (while_running.st_uid, while_running.st_gid) == (QEMU_UID, QEMU_GID)
    assert while_running.st_mode & 0o777 == 0o644
    domain.virsh("destroy")
    assert base.path.stat().st_uid == QEMU_UID
    domain.virsh("start")
    with domain.console() as console:
        assert console.make_pass() == (1, base.image.pass_hash)
    assert_no_complaints(domain.libvirt, base)


def test_stop_opens_the_base_for_writing_is_refused_and_does_not_mind(domain: Domain, base: Base) -> None:
    domain.virsh("destroy")
    assert domain.state() == "shut off"
    assert_no_complaints(domain.libvirt, base)
    with pytest.raises(OSError, match="Read-only file system"):
        os.open(base.path, os.O_RDWR)


def test_hard_reboot_starts_the_domain_again_on_the_same_overlay(domain: Domain, base: Base) -> None:
    with domain.console() as console:
        console.make_pass()
    domain.virsh("destroy")
    domain.virsh("undefine")
    domain.define()
    domain.virsh("start")
    with domain.console() as console:
        assert console.make_pass() == (1, base.image.pass_hash)


def test_a_guest_goes_on_while_its_base_graduates_and_is_removed(
    domain: Domain, base: Base, mount: BasefsMount
) -> None:
    with domain.console() as console:
        console.make_pass()
        mount.cli("drain")
        assert console.make_pass() == (2, base.image.pass_hash)
        graduated = base.path.rename(base.path.with_name("aside"))
        assert console.make_pass() == (3, base.image.pass_hash)
    graduated.rename(base.path)
    domain.virsh("destroy")
    domain.virsh("start")  # on the file
    with domain.console() as console:
        assert console.make_pass() == (1, base.image.pass_hash)
    assert_no_complaints(domain.libvirt, base)


def test_live_snapshot_is_the_disk_of_that_moment(domain: Domain, base: Base) -> None:
    """The steps of nova's _live_snapshot: a copy of the top layer onto an overlay of the base, then all of it."""
    with domain.console() as console:
        console.make_pass()
        delta, snapshot = domain.directory / "disk.delta", domain.directory / "snapshot.raw"
        domain.make_overlay(delta)
        domain.virsh("undefine")  # libvirt copies the disks of transient domains only
        domain.virsh("blockcopy", "vda", str(delta), "--shallow", "--reuse-external", "--wait", "--finish")
        domain.define()
        console.make_pass()
        convert = ("qemu-img", "convert", "-t", "none", "-f", "qcow2", "-O", "raw")
        domain.libvirt.run(*convert, str(delta), str(snapshot))
        assert console.make_pass() == (3, base.image.pass_hash)
    expected = base.image.after_pass(1)
    assert domain.outside(snapshot).read_bytes() == expected + bytes(-len(expected) % SECTOR_BYTES)
    assert_no_complaints(domain.libvirt, base)


def test_a_saved_guest_goes_on_where_it_was(domain: Domain, base: Base) -> None:
    """nova's suspend: managedSave, and start."""
    with domain.console() as console:
        assert console.make_pass() == (1, base.image.pass_hash)
    domain.virsh("managedsave")
    assert domain.state() == "shut off"
    domain.virsh("start")
    with domain.console() as console:
        assert console.make_pass() == (2, base.image.pass_hash)
    assert_no_complaints(domain.libvirt, base)


def test_a_guest_outlives_a_restart_of_libvirtd(domain: Domain, base: Base) -> None:
    with domain.console() as console:
        console.begin_pass()
        domain.libvirt.stop()
        domain.libvirt.start()
        assert domain.state() == "running"
        assert console.end_pass() == (1, base.image.pass_hash)
        assert console.make_pass() == (2, base.image.pass_hash)
    domain.virsh("destroy")
    assert_no_complaints(domain.libvirt, base)


def test_a_guest_suspended_in_a_cold_read_goes_on_when_resumed(domain: Domain, base: Base) -> None:
    """nova's pause and unpause."""
    with domain.console() as console:
        console.begin_pass()
        domain.virsh("suspend")
        assert domain.state() == "paused"
        domain.virsh("resume")
        assert console.end_pass() == (1, base.image.pass_hash)


def test_block_statistics_show_the_size_of_the_base_and_what_of_it_is_here(domain: Domain, base: Base) -> None:
    with domain.console() as console:
        console.make_pass()
    size = len(base.image.content)
    capacity = size + -size % SECTOR_BYTES
    assert re.search(rf"Capacity:\s+{capacity}\n", domain.virsh("domblkinfo", "vda"))
    statistics = domain.libvirt.virsh("domstats", "--block", "--backing", domain.name)
    values = dict(line.strip().split("=", 1) for line in statistics.splitlines() if "=" in line)
    (backing,) = (key.removesuffix(".path") for key, value in values.items() if value == str(domain.base))
    assert int(values[f"{backing}.capacity"]) == capacity
    assert int(values[f"{backing}.physical"]) == base.path.stat().st_blocks * 512 >= size


def test_a_deleted_instance_leaves_the_base_as_it_was(domain: Domain, base: Base) -> None:
    domain.virsh("undefine")
    assert domain.state() == "running"
    domain.virsh("destroy")
    assert domain.name not in domain.libvirt.virsh("list", "--all", "--name")
    assert base.path.read_bytes() == base.image.content
    assert_no_complaints(domain.libvirt, base)

"""The peers, by the names that tables show."""

import json
import subprocess
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from tools.bench.nova_process import Nova
from tools.bench.peers.base import START_S, Peer, PeerError, TooLongError, wait_for_mount
from tools.bench.peers.site import Access, Disk
from tools.bench.restart import wait_for_standby
from tools.mount import ROOT, RUN_VARIABLE, BasefsMount, base_name

RCLONE = ROOT / ".venvs/peers/bin/rclone"


def first_line(*argv: str) -> str:
    """The first line that a command prints."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.partition("\n")[0]


class Basefs(Peer):
    """This project, as `basefs mount` starts it; nothing is fetched but what is read and what that leads to."""

    name = "basefs"
    options: ClassVar[Mapping[str, object]] = {}
    """Beside those that say where it is: as it comes."""

    def __init__(self, access: Access, directory: Path) -> None:
        super().__init__(access, directory)
        self._mount = BasefsMount(directory / "basefs", access.conf_lines(), dict(self.options))

    @classmethod
    def version(cls) -> str:
        commit = first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty")
        return f"basefs {version('basefs')} ({commit}), pyfuse3 {version('pyfuse3')}"

    def start(self) -> None:
        self._mount.start()
        wait_for_standby(self._mount)  # a mount that guests come to is older than a second
        self._mount.wait_for_images(len(self.access.site.disks))

    def bring(self, disk: Disk, guest: int, limit_s: float) -> Path:  # noqa: ARG002 (the base class's signature)
        return self._mount.path(self.image_id(disk))

    def image_id(self, disk: Disk) -> str:
        """Which of a disk's images it reads."""
        return disk.image_id

    def pids(self) -> list[int]:
        return self._mount.pids()

    def stop(self) -> None:
        try:
            self._mount.stop()
        finally:
            super().stop()

    def recorded(self, disk: Disk) -> bytes:
        """The boot trace that the first opener of a disk left, once it is written."""
        path = self._mount.cache_dir / "traces" / f"{base_name(self.image_id(disk))}.json"
        deadline = time.monotonic() + START_S
        while not path.exists():
            if time.monotonic() > deadline:
                raise PeerError(f"no boot trace was recorded at {path}")
            time.sleep(0.05)
        return path.read_bytes()


class BasefsTraced(Basefs):
    """The same on a node that has the boot traces of all disks, from an earlier boot of each."""

    name = "basefs trace"

    def start(self) -> None:
        traces = self._mount.cache_dir / "traces"
        traces.mkdir()
        for disk in self.access.site.disks:
            trace = {**json.loads(self.access.site.boot_trace), "image_id": disk.image_id}
            (traces / f"{base_name(disk.image_id)}.json").write_text(json.dumps(trace), encoding="ascii")
        super().start()


class BasefsTwoReaders(Basefs):
    """The same with two readers, the default from three processors on; in works of what is here only."""

    name = "basefs 2 readers"
    options: ClassVar[Mapping[str, object]] = {"readers": 2}


class BasefsPacked(Basefs):
    """The same from the compressed qcow2, of which it shows the disk: what nova's download is given."""

    name = "basefs qcow2"

    def image_id(self, disk: Disk) -> str:
        return disk.packed_id


class Local(Peer):
    """The raw disk as a file on this machine's disk: the limit."""

    name = "local file"

    @classmethod
    def version(cls) -> str:
        return "the raw disk, on this machine's disk"

    def bring(self, disk: Disk, guest: int, limit_s: float) -> Path:  # noqa: ARG002 (the base class's signature)
        return disk.original


class NovaDownload(Peer):
    """nova's own code: LibvirtDriver.cache_image, which downloads the qcow2 and converts it to raw, one at a time."""

    name = "nova"

    def __init__(self, access: Access, directory: Path) -> None:
        super().__init__(access, directory)
        self._turn = threading.Lock()
        self._nova: Nova | None = None

    @classmethod
    def version(cls) -> str:
        python = str(ROOT / ".venvs/nova34/bin/python")
        said = first_line(python, "-c", "import importlib.metadata as m; print(m.version('nova'))")
        return f"nova {said}, download and qemu-img convert of the compressed qcow2"

    def start(self) -> None:
        (self.directory / "_base").mkdir()
        self._nova = nova = Nova("nova34", {RUN_VARIABLE: self.run_id, "TMPDIR": str(self.directory)})
        token = self.access.site.rig.token("u1")
        nova.run("configure", instances_path=str(self.directory), glance_url=self.access.glance_url, token=token)

    def bring(self, disk: Disk, guest: int, limit_s: float) -> Path:  # noqa: ARG002 (the base class's signature)
        nova, end = self._nova, time.monotonic() + limit_s
        assert nova is not None
        if not self._turn.acquire(timeout=limit_s):
            raise TooLongError
        alarm = threading.Timer(end - time.monotonic(), nova.kill)
        alarm.start()
        try:
            answer = nova.run("precache", image_ids=[disk.packed_id])
        except (EOFError, BrokenPipeError) as error:
            raise TooLongError from error
        finally:
            alarm.cancel()
            self._turn.release()
        if answer["result"] != {disk.packed_id: True}:
            raise PeerError(f"nova did not download: {answer}")
        return self.directory / "_base" / base_name(disk.packed_id)

    def stop(self) -> None:
        if self._nova is not None:
            self._nova.kill()
        super().stop()


class Rclone(Peer):
    """rclone mount with its full cache, over the web server; what was fetched is shared by all guests of the node.

    Set as an operator who has measured would: the trace over 10 ms and over 50 Mbit/s takes 6.8 and 87 s (760 and
    539 MB) with its defaults, 3.9 and 30 s with chunks that begin at 1 MiB and no buffer, 4.5 and 18 s (100 MB) so.
    """

    name = "rclone"
    options: ClassVar[tuple[str, ...]] = ("--vfs-cache-mode=full", "--vfs-read-chunk-size=256K", "--buffer-size=0")

    @classmethod
    def version(cls) -> str:
        return f"{first_line(str(RCLONE), 'version')}, mount {' '.join(cls.options)}"

    def start(self) -> None:
        self._mountpoint = self.directory / "mount"
        self._mountpoint.mkdir()
        process = self.spawn(
            RCLONE, "mount", ":http:", self._mountpoint, f"--http-url={self.access.web_url}", "--config=",
            f"--cache-dir={self.directory / 'cache'}", "--read-only", "--dir-cache-time=24h", *self.options,
        )  # fmt: skip
        wait_for_mount(self._mountpoint, process)

    def bring(self, disk: Disk, guest: int, limit_s: float) -> Path:  # noqa: ARG002 (the base class's signature)
        return self._mountpoint / disk.name


class Nbdkit(Peer):
    """nbdkit's curl plugin under its readahead and cache filters, shown as a file by nbdfuse; both for each disk."""

    name = "nbdkit"
    filters: ClassVar[tuple[str, ...]] = ("--filter=readahead", "--filter=cache")

    @classmethod
    def version(cls) -> str:
        nbdfuse = first_line("nbdfuse", "--version")
        return f"{first_line('nbdkit', '--version')} curl {' '.join(cls.filters)} cache-on-read=true, {nbdfuse}"

    def bring(self, disk: Disk, guest: int, limit_s: float) -> Path:  # noqa: ARG002 (the base class's signature)
        socket = self.directory / f"{disk.name}.sock"
        self.run(
            "nbdkit", "--readonly", "--unix", socket, "--pidfile", self.directory / f"{disk.name}.pid", *self.filters,
            "curl", f"url={self.access.url(disk)}", "cache-on-read=true",
        )  # fmt: skip
        return self.show_by_nbdfuse(socket, self.directory / f"{disk.name}.d")


class Qemu(Peer):
    """qemu's http driver under copy-on-read into the guest's overlay; a path to it by qemu-storage-daemon and nbdfuse.

    What one guest fetched is in its overlay, so no other guest has it. qemu 7.2 hangs, for ever and without a request
    on its way, when parallel reads are missing at the far end (four of six reads of 256 MiB through the page cache did,
    by nbdfuse and by the daemon's own FUSE export, with and without our proxy): it is given them one at a time.
    """

    name = "qemu http"
    shares = False
    takes_parallel_misses = False

    @classmethod
    def version(cls) -> str:
        return f"{first_line('qemu-storage-daemon', '--version')}, http backing file, copy-on-read"

    def bring(self, disk: Disk, guest: int, limit_s: float) -> Path:  # noqa: ARG002 (the base class's signature)
        stem = f"{disk.name}.{guest}"
        overlay, socket = self.directory / f"{stem}.qcow2", self.directory / f"{stem}.sock"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), str(disk.size)], check=True)
        nodes = (
            {"driver": "http", "node-name": "far", "read-only": True, "url": self.access.url(disk)},
            {"driver": "file", "node-name": "file", "filename": str(overlay)},
            {"driver": "qcow2", "node-name": "overlay", "file": "file", "backing": "far"},
            {"driver": "copy-on-read", "node-name": "disk", "file": "overlay"},
        )
        server = f"addr.type=unix,addr.path={socket}"
        self.run(
            "qemu-storage-daemon", "--daemonize", "--pidfile", self.directory / f"{stem}.pid",
            *(word for node in nodes for word in ("--blockdev", json.dumps(node))), "--nbd-server", server,
            "--export", "nbd,id=export,node-name=disk,name=",
        )  # fmt: skip
        return self.show_by_nbdfuse(socket, self.directory / f"{stem}.d")

    def overlay(self, disk: Disk, target: Path, *, limit_s: float) -> str:  # noqa: ARG002 (the base class's signature)
        backing = f"backing_file={self.access.url(disk)},backing_fmt=raw"
        argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", backing, str(target), str(disk.size)]
        subprocess.run(argv, check=True)
        return "copy-on-read=on"


PEERS: tuple[type[Peer], ...] = (Basefs, BasefsTraced, Local, BasefsPacked, NovaDownload, Rclone, Nbdkit, Qemu)

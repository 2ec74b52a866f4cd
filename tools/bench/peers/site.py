"""The far side: a real Glance and a web server with the same disks, and how they look through a link."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tools.bench.peers.link import Crossed, Link
from tools.bench.peers.link_model import LinkSpec
from tools.guest import Guest, packed
from tools.mount import ROOT
from tools.rig import Rig

BLOB_BYTES = 256 << 20
END_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One disk as everybody gets it: an image in Glance, the same as a compressed qcow2 there, a file on the web."""

    name: str
    image_id: str
    packed_id: str
    original: Path

    @property
    def size(self) -> int:
        """Bytes of the raw disk."""
        return self.original.stat().st_size


class Site:
    """Both servers, `disks` (the guest's, `count` times under names and ids of their own) and `blob` (random bytes)."""

    def __init__(self, directory: Path, guest: Guest, count: int, *, web_asks_glance: bool) -> None:
        self._directory = directory
        self._guest = guest
        self._count = count
        self._web_asks_glance = web_asks_glance
        self._stack = contextlib.ExitStack()
        self.disks: list[Disk] = []
        self.boot_trace = b""
        """Of the first disk, for whoever knows it before: of the work at hand, recorded by basefs."""
        self.guest_distinct_bytes = 0
        """What a real guest's boot reads of it, in 64 KiB; 0: nobody recorded one."""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self) -> None:
        self.web = self._directory / "web"
        self.web.mkdir(parents=True)
        self.rig = self._stack.enter_context(Rig(self._directory / "rig"))
        raw, small = self._guest.disk, packed(self._guest)
        ids, packed_ids = ([one, *self.rig.clone(one, self._count - 1)] for one in (
            self.rig.place(raw, "debian12", visibility="public"),
            self.rig.place(small, "debian12-packed", "qcow2", visibility="public"),
        ))  # fmt: skip
        for number, (image_id, packed_id) in enumerate(zip(ids, packed_ids, strict=True)):
            name = f"debian12-{number:02}.raw"
            self._show(Disk(name=name, image_id=image_id, packed_id=packed_id, original=raw))
        blob = self._directory / "blob.raw"
        with open(blob, "wb") as out:
            out.writelines(os.urandom(1 << 20) for _ in range(BLOB_BYTES >> 20))
        self.blob = Disk(name="blob.raw", image_id=self.rig.place(blob, "blob"), packed_id="", original=blob)
        os.symlink(blob, self.web / self.blob.name)
        self.web_url = self._serve_web()

    def _show(self, disk: Disk) -> None:
        self.disks.append(disk)
        os.symlink(disk.original, self.web / disk.name)

    def glance_file(self, image_id: str) -> str:
        """Where Glance has an image's bytes."""
        return f"{self.rig.glance_url}/v2/images/{image_id}/file"

    def _serve_web(self) -> str:
        argv = [sys.executable, "-m", "tools.bench.peers.range_server", str(self.web)]
        if self._web_asks_glance:
            argv.append(json.dumps({disk.name: self.glance_file(disk.image_id) for disk in [*self.disks, self.blob]}))
        server = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert server.stdin is not None
        assert server.stdout is not None
        self._stack.callback(server.wait, END_S)
        self._stack.callback(server.stdin.close)
        self._stack.enter_context(server.stdout)
        return f"http://127.0.0.1:{json.loads(server.stdout.readline())['port']}"


class Access:
    """A site through a link: one proxy in front of each server, so everybody has the whole link to himself."""

    def __init__(self, site: Site, spec: LinkSpec) -> None:
        self.site = site
        self.spec = spec
        self._stack = contextlib.ExitStack()
        try:
            self._links = [self._stack.enter_context(Link(url, spec)) for url in (site.rig.glance_url, site.web_url)]
        except BaseException:
            self._stack.close()
            raise
        self.glance_url, self.web_url = (link.url for link in self._links)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def conf_lines(self) -> str:
        """The [glance] section of a basefs.conf."""
        return self.site.rig.conf_lines().replace(self.site.rig.glance_url, self.glance_url)

    def url(self, disk: Disk) -> str:
        """Where the raw disk is on the web."""
        return f"{self.web_url}/{disk.name}"

    def crossed(self) -> Crossed:
        """What has crossed so far."""
        both = [link.crossed() for link in self._links]
        return Crossed(down_bytes=sum(one.down_bytes for one in both), requests=sum(one.requests for one in both))

"""Reads of a disk that is here completely, O_DIRECT: small ones at random, large ones in a row; and bringing it."""

import contextlib
import os
import subprocess
import time
from pathlib import Path

from tools.bench.cached import DIRECT, fio_read
from tools.bench.peers.link_model import LinkSpec
from tools.bench.peers.peers import Basefs, BasefsPacked, BasefsTraced, BasefsTwoReaders, NovaDownload
from tools.bench.peers.site import BLOB_BYTES, Access
from tools.bench.peers.work import Bench

ROUND_S = 1
WHOLE_S = 120.0
WHOLE = "read from end to end, cold"
CURL = "curl to a file"
LEFT_OUT = (BasefsTraced, BasefsPacked, NovaDownload)
"""What is read then is the same as of basefs, and as of the local file."""


def name(workload: str) -> str:
    """The work's name in tables."""
    return f"{workload}, cached"


def cached_disk(bench: Bench, link: LinkSpec) -> None:
    """All peers side by side, each read by turns; beside the first, cold read a curl of the same bytes from Glance."""
    kinds = [kind for kind in bench.peers if kind not in LEFT_OUT]
    if Basefs in kinds:
        kinds.append(BasefsTwoReaders)
    with contextlib.ExitStack() as stack:
        access = stack.enter_context(Access(bench.site, link))
        paths: dict[str, Path] = {}
        _read_whole(bench, access, CURL, None)
        for number, kind in enumerate(kinds):
            peer = stack.enter_context(kind(access, bench.scratch / f"cached-{number}"))
            paths[kind.name] = peer.path(bench.site.blob)
            flags = () if kind.takes_parallel_misses else ("iflag=direct",)
            _read_whole(bench, access, kind.name, paths[kind.name], *flags)
            subprocess.run(["cmp", str(paths[kind.name]), str(bench.site.blob.original)], check=True)
        for workload in DIRECT:
            for alternation, kind in bench.turns(kinds, name(workload.name), link.name, bench.alternations):
                iops, bytes_s = fio_read(
                    paths[kind.name], "--direct=1", "--time_based", f"--runtime={ROUND_S}", "--norandommap",
                    f"--size={BLOB_BYTES - (1 << 20)}", *workload.arguments,
                )  # fmt: skip
                value, unit = (bytes_s / 1e9, "GB/s") if workload.is_throughput else (iops, "IOPS")
                bench.add_value(name(workload.name), link, kind.name, alternation, value, unit)


def _read_whole(bench: Bench, access: Access, peer: str, path: Path | None, *flags: str) -> None:
    target = bench.scratch / "curl.raw"
    url = f"{access.glance_url}/v2/images/{bench.site.blob.image_id}/file"
    begun = time.monotonic()
    if path is None:
        subprocess.run(["curl", "-sf", "-o", str(target), url], check=True, timeout=WHOLE_S)
    else:
        subprocess.run(
            ["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none", *flags], check=True, timeout=WHOLE_S
        )
    bytes_s = BLOB_BYTES / (time.monotonic() - begun)
    bench.add_value(WHOLE, access.spec, peer, 0, bytes_s / 1e9, "GB/s")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)

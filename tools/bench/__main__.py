"""python -m tools.bench [NAME ...]: runs the parts named, or all; fails when a bound is missed."""

import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tools.bench import (
    boot,
    cached,
    graduated,
    guest_boot,
    hydrate,
    link,
    linked,
    nova_boot,
    planner,
    qcow2,
    restart,
    scale,
    stores,
    trace,
    verify,
)
from tools.bench.report import Report
from tools.mount import ROOT

PARTS: dict[str, Callable[[Report, Path], None]] = {
    "boot": boot.run,
    "planner": planner.run,
    "trace": trace.run,
    "link": link.run,
    "linked": linked.run,
    "cached": cached.run,
    "qcow2": qcow2.run,
    "guest": guest_boot.run,
    "graduated": graduated.run,
    "scale": scale.run,
    "restart": restart.run,
    "verify": verify.run,
    "hydrate": hydrate.run,
    "nova": nova_boot.run,
    "stores": stores.run,
}
NAMED_ONLY = {"stores"}
"""Those that need more of the machine than `tools/setup` brings."""


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that everything is put away
    names = sys.argv[1:] or [name for name in PARTS if name not in NAMED_ONLY]
    if unknown := set(names) - set(PARTS):
        sys.exit(f"no part named {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    report = Report()
    scratch_root = (ROOT / ".cache" / "bench").resolve()  # the mount table has no links
    scratch_root.mkdir(parents=True, exist_ok=True)
    for name in names:
        scratch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=scratch_root))
        try:
            PARTS[name](report, scratch)
        finally:
            shutil.rmtree(scratch)
    if not report.summary():
        sys.exit(1)


main()

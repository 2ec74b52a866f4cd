"""python -m tools.guest build | boot: the guest image, and one boot of it on a plain file for comparison."""

import sys
import tempfile
import time

from tools.guest import boot, build, create_overlay


def main() -> None:
    begun = time.monotonic()
    guest = build()
    allocated = guest.disk.stat().st_blocks * 512
    print(f"{guest.disk}: {allocated / 1e6:.0f} MB allocated, ready after {time.monotonic() - begun:.1f} s")
    if sys.argv[1:] == ["boot"]:
        with tempfile.TemporaryDirectory() as scratch:
            create_overlay(guest.disk, scratch + "/disk")
            result = boot(scratch + "/disk", guest, check=True)
        right = result.payload_sha256 == guest.payload_sha256
        print(
            f"multi-user.target after {result.ready_s:.1f} s, off after {result.total_s:.1f} s, payload right: {right}"
        )


main()

"""A small real Debian guest: its disk image, built once, and one function that boots it.

`build()` makes `.cache/guest/` with a raw disk, kernel and initrd beside it; `boot()` starts qemu on an overlay and
returns when the guest has powered itself off.
"""

from tools.guest.boot import BootError, BootResult, BootTimeoutError, boot, create_overlay
from tools.guest.build import Guest, GuestBuildError, build
from tools.guest.packed import packed

__all__ = [
    "BootError",
    "BootResult",
    "BootTimeoutError",
    "Guest",
    "GuestBuildError",
    "boot",
    "build",
    "create_overlay",
    "packed",
]

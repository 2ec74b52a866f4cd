"""Formats that qemu finds in a file by its first bytes, after the block drivers' `bdrv_probe` functions.

`qemu-img info` on a base decides the backing format of its overlays, so a byte string that qemu takes for
anything but raw must not be shown as raw. Formats probed by file name only (dmg, vvfat) do not matter here.
"""

_MAGICS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\x00", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image\x00", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    (0, b"LUKS\xba\xbe", "luks"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)
_PROBED_BYTES = 2048
"""qemu gives its drivers the first 2048 bytes of a file (BLOCK_PROBE_BUF_SIZE is 512 since 2.x; more is safer)."""


def format_seen_by_qemu(header: bytes) -> str | None:
    """The format that qemu may take `header` for, None for raw. Errs towards a format."""
    for offset, magic, name in _MAGICS:
        if header.startswith(magic, offset):
            return name
    return "vmdk" if _is_vmdk_text(header[:_PROBED_BYTES]) else None


def _is_vmdk_text(head: bytes) -> bool:
    """A VMDK descriptor: comment and blank lines, then `version=`. It may name any file of the host."""
    for line in head.split(b"\n"):
        text = line.strip()
        if text and not text.startswith(b"#"):
            return text.lower().startswith(b"version=")
    return False

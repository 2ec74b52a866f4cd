"""Whether an image may be shown (design section 4).

These are the checks that nova makes at download and skips when the base exists already (nova-contract
section 3, rows a and c to i). Pure; hostile input is the normal case.
"""

import io
import logging
import struct
from typing import Literal

from oslo_utils.imageutils import format_inspector

from basefs.catalog import qemu_probe
from basefs.catalog.records import ImageRecord, Verdict

View = Literal["raw", "stored"]

HEADER_BYTES_MAX = 256 * 1024
"""What the content check wants of an image (of a smaller one: all). nova's inspectors decide within it."""
_STEP_BYTES = 4096
_AMI_FORMATS = ("ami", "aki", "ari")
_SHOWN_AS_STORED = ("raw", "iso", *_AMI_FORMATS)
_PLAIN_CONTAINERS = ("bare", *_AMI_FORMATS)
"""Containers around nothing: the stored bytes are the disk. Not ova, ovf, docker, compressed."""
_SEEN_AS_RAW_BY_QEMU = ("raw", "gpt", "iso")
_INSPECTOR_ERRORS = (
    format_inspector.ImageFormatError,
    format_inspector.SafetyViolation,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What the inspectors raise over bytes made to break them (AttributeError: a VMDK text in no ASCII)."""

# They log each failed check with up to two records of their own; the verdict's reason says it all.
logging.getLogger(format_inspector.__name__).setLevel(logging.CRITICAL)


def metadata_verdict(record: ImageRecord, *, view: View, verify_signatures: bool) -> Verdict:
    """What Glance's metadata alone say: refused, or unchecked because the content decides.

    `view` and `verify_signatures` are the options of those names.
    """
    if record.status != "active":
        return _refused(f"its status is {record.status}, not active")
    if not record.size:
        return _refused("it is empty" if record.size == 0 else "Glance does not know its size")
    if record.container_format not in _PLAIN_CONTAINERS:
        return _refused(f"container_format {record.container_format} must be unpacked first; nova downloads it")
    if record.is_signed and verify_signatures:
        return _refused("it is signed and signatures are to be verified; nova downloads and verifies it")
    if record.disk_format == "qcow2":
        if view != "stored":
            return _refused("there is no raw view of qcow2 yet; nova downloads and converts it")
    elif record.disk_format not in _SHOWN_AS_STORED:
        return _refused(f"disk_format {record.disk_format} has no raw view; nova downloads and converts it")
    return Verdict(state="unchecked")


def content_verdict(record: ImageRecord, header: bytes, *, view: View) -> Verdict:
    """Servable, or refused with the reason, from the image's first `min(size, HEADER_BYTES_MAX)` bytes.

    Never raises, whatever the bytes are; takes milliseconds and a few times the header's memory.
    """
    size = record.size or 0
    if len(header) < min(size, HEADER_BYTES_MAX):
        return _refused(f"only {len(header)} bytes of its header are there")
    try:
        inspector = _detected(header[:HEADER_BYTES_MAX], is_all=size <= HEADER_BYTES_MAX)
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as exc:
        return _refused(f"its content fails the safety check: {_failures(exc)}")
    except _INSPECTOR_ERRORS as exc:
        return _refused(f"its content cannot be told to be {record.disk_format}: {exc}")
    return _agreement(record.disk_format or "", str(inspector), header, view=view)


def _detected(header: bytes, *, is_all: bool) -> format_inspector.FileInspector:
    """The one format that the bytes have; as nova/virt/images.py get_image_format.

    Raises:
        ImageFormatError: they have several, or cannot be told within the header.
    """
    wrapper = format_inspector.InspectWrapper(io.BytesIO(header))
    formats = None
    for _ in range(0, len(header), _STEP_BYTES):
        wrapper.read(_STEP_BYTES)
        formats = wrapper.formats
        if formats:
            break
    if not formats and not is_all:
        # nova would read on. Only formats that are refused anyway keep their inspectors waiting that long.
        raise format_inspector.ImageFormatError(f"undecided after {len(header)} bytes")
    wrapper.close()
    formats = wrapper.formats or []
    names = {str(inspector) for inspector in formats}
    if names == {"iso", "gpt"}:
        return next(inspector for inspector in formats if str(inspector) == "iso")
    if len(formats) != 1:
        raise format_inspector.ImageFormatError(f"it is several formats at once: {', '.join(sorted(names))}")
    return formats[0]


def _agreement(disk_format: str, detected: str, header: bytes, *, view: View) -> Verdict:
    """Whether the bytes are what the metadata say, and qemu sees in them what we want shown."""
    if disk_format == "qcow2" and view == "stored":
        return Verdict(state="servable") if detected == "qcow2" else _mismatch(disk_format, detected)
    if disk_format not in _SHOWN_AS_STORED:
        return _refused(f"disk_format {disk_format} has no raw view")
    is_whole_disk = disk_format == "raw" and detected == "gpt"
    if disk_format not in _AMI_FORMATS and detected != disk_format and not is_whole_disk:
        return _mismatch(disk_format, detected)
    # nova compares with `qemu-img info` next, which knows formats that the inspectors do not.
    if detected not in _SEEN_AS_RAW_BY_QEMU:
        return _mismatch(disk_format, detected)
    probed = qemu_probe.format_seen_by_qemu(header)
    return Verdict(state="servable") if probed is None else _mismatch(disk_format, probed)


def _failures(exc: format_inspector.SafetyCheckFailed) -> str:
    return "; ".join(f"{name}: {failure}" for name, failure in sorted(exc.failures.items()))


def _mismatch(disk_format: str, detected: str) -> Verdict:
    return _refused(f"disk_format is {disk_format} but its content is {detected}")


def _refused(reason: str) -> Verdict:
    return Verdict(state="refused", reason=reason)

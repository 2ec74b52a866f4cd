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
from basefs.core.qcow2_header import qcow2_layout_of

View = Literal["raw", "stored"]

HEADER_BYTES_MAX = 256 * 1024
"""What the content check wants of an image (of a smaller one: all). nova's inspectors decide within it."""
QCOW2 = "qcow2"
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


def metadata_verdict(record: ImageRecord, *, verify_signatures: bool) -> Verdict:
    """What Glance's metadata alone say: refused, or unchecked because the content decides.

    `verify_signatures` is the option of that name.
    """
    if record.status != "active":
        return _refused(f"its status is {record.status}, not active")
    if not record.size:
        return _refused("it is empty" if record.size == 0 else "Glance does not know its size")
    if record.container_format not in _PLAIN_CONTAINERS:
        return _refused(f"container_format {record.container_format} must be unpacked first; nova downloads it")
    if record.is_signed and verify_signatures:
        return _refused("it is signed and signatures are to be verified; nova downloads and verifies it")
    if record.disk_format not in (QCOW2, *_SHOWN_AS_STORED):
        return _refused(f"disk_format {record.disk_format} has no raw view; nova downloads and converts it")
    return Verdict(state="unchecked")


def content_verdict(record: ImageRecord, header: bytes, *, view: View) -> Verdict:
    """Servable, or refused with the reason, from the image's first `min(size, HEADER_BYTES_MAX)` bytes.

    Never raises, whatever the bytes are; takes milliseconds and a few times the header's memory. With the raw view of a
    qcow2 image the verdict has its `shown_size`, and what is shown is still to be checked: `disk_verdict`.
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
    if record.disk_format == QCOW2:
        return _qcow2_verdict(str(inspector), header, size, view=view)
    return _agreement(record.disk_format or "", str(inspector), header)


def disk_verdict(servable: Verdict, first: bytes) -> Verdict:
    """`servable`, or refused, from the first bytes that the raw view shows: `min(shown_size, HEADER_BYTES_MAX)`.

    nova converts such an image and then wants `qemu-img info` to say raw (images.py fetch_to_raw); what is inside could
    be a qcow2 with a backing file of the host. Never raises.
    """
    try:
        inspector = _detected(first, is_all=len(first) == servable.shown_size)
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as exc:
        return _refused(f"the disk in it fails the safety check: {_failures(exc)}")
    except _INSPECTOR_ERRORS as exc:
        return _refused(f"the disk in it cannot be told to be raw: {exc}")
    seen = str(inspector)
    if seen in _SEEN_AS_RAW_BY_QEMU:
        seen = qemu_probe.format_seen_by_qemu(first) or "raw"
    return servable if seen in _SEEN_AS_RAW_BY_QEMU else _refused(f"the disk in it is {seen}, not raw")


def _qcow2_verdict(detected: str, header: bytes, size: int, *, view: View) -> Verdict:
    """Whether the bytes are qcow2, and with the raw view: one that has it."""
    if detected != QCOW2:
        return _mismatch(QCOW2, detected)
    if view == "stored":
        return Verdict(state="servable")
    try:
        return Verdict(state="servable", shown_size=qcow2_layout_of(header, stored_size=size).size)
    except ValueError as exc:
        return _refused(f"its qcow2 has no raw view: {exc}")


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


def _agreement(disk_format: str, detected: str, header: bytes) -> Verdict:
    """Whether the bytes are what the metadata say, and qemu sees in them what we want shown."""
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

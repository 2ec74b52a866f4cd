"""Boot traces as a property: short, of the very image, and whatever stands there gives a trace or ValueError."""

import base64
import contextlib
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.boot_trace import MS_MAX, RANGES_MAX, UNIT_BYTES, BootTrace, TracedImage, TraceRange, TraceRecording
from basefs.core.trace_property import PROPERTY_CHARS_MAX, property_of, trace_of_property
from tools.bench.replay import load_trace

IMAGE = TracedImage(image_id="11111111-2222", size=3 << 30, os_hash_algo="sha512", os_hash_value="00ff")


def recorded_boot() -> BootTrace:
    recording = TraceRecording()
    for at, (offset, length) in enumerate(load_trace()):
        recording.note(range(offset // UNIT_BYTES, (offset + length - 1) // UNIT_BYTES + 1), at * 20)
    return recording.trace(IMAGE, by_guest=True)


def packed(inner: bytes, version: str = "1") -> str:
    return f"{version}:{base64.urlsafe_b64encode(zlib.compress(inner)).decode()}"


def identity() -> bytes:
    text = property_of(recorded_boot())
    return zlib.decompress(base64.urlsafe_b64decode(text.partition(":")[2]))[:16]


def test_a_debian_boot_is_less_than_3_kb_and_comes_back_whole() -> None:
    text = property_of(recorded_boot())
    assert len(text) < 3000
    assert trace_of_property(text, IMAGE) == recorded_boot()


@given(st.lists(st.integers(0, IMAGE.units - 2), unique=True, max_size=300), st.booleans(), st.integers(1, 1000))
def test_any_trace_comes_back(units: list[int], by_guest: bool, boots: int) -> None:
    ranges = tuple(TraceRange(unit, 1, 7 * at, at % 3) for at, unit in enumerate(units))
    trace = BootTrace(image=IMAGE, boots=boots, by_guest=by_guest, ranges=ranges)
    text = property_of(trace)
    assert len(text) <= PROPERTY_CHARS_MAX
    assert trace_of_property(text, IMAGE) == trace


def test_what_is_too_long_loses_its_end() -> None:
    rng = random.Random(5)
    units = rng.sample(range(IMAGE.units), RANGES_MAX)
    times = sorted(rng.sample(range(MS_MAX), RANGES_MAX))
    ranges = tuple(TraceRange(unit, 1, at_ms, 0) for unit, at_ms in zip(units, times, strict=True))
    trace = BootTrace(image=IMAGE, boots=1, by_guest=True, ranges=ranges)
    text = property_of(trace)
    assert len(text) <= PROPERTY_CHARS_MAX
    kept = trace_of_property(text, IMAGE).ranges
    assert 100 < len(kept) < RANGES_MAX
    assert kept == ranges[: len(kept)]


@pytest.mark.parametrize(
    ("field", "value"), [("image_id", "another"), ("size", 1 << 30), ("os_hash_algo", None), ("os_hash_value", "ff00")]
)
def test_a_trace_of_other_bytes_is_refused(field: str, value: object) -> None:
    other = TracedImage(**{name: getattr(IMAGE, name) for name in TracedImage.__slots__} | {field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of other bytes"):
        trace_of_property(property_of(recorded_boot()), other)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no boot trace of version 1"),
        (packed(b"", version="2"), "no boot trace of version 1"),
        ("1:" + "A" * PROPERTY_CHARS_MAX, "at most 8192 characters"),
        ("1:ä", "no boot trace"),
        ("1:AAAA", "no boot trace"),
        (property_of(recorded_boot())[:255], "no boot trace|cut off"),
        (packed(bytes(1 << 24)), "too large|at most"),
        (packed(b"short"), "of other bytes"),
    ],
)
def test_what_is_no_trace_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trace_of_property(text, IMAGE)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (b"", "too early"),
        (b"\1\1\1\0\1\0", "too early"),
        (b"\1\1\0\0", "behind its end"),
        (b"\1\1\x80", "within a number"),
        (b"\x80" * 8 + b"\1", "too large"),
        (b"\0\1\0", "boots"),
        (b"\1\1\1\0\0\0\0", "ranges"),
        (b"\1\1\1\1\1\0\0", "ranges"),
        (b"\1\1\2" + b"\0\1\0\0" + b"\1\1\0\0", "in a range before"),
        (b"\1\1\1\0\1\0\7", "ranges"),
    ],
)
def test_what_contradicts_itself_is_refused_as_in_a_file(numbers: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trace_of_property(packed(identity() + numbers), IMAGE)


@given(st.one_of(st.text(max_size=300), st.binary(max_size=300).map(lambda data: packed(identity() + data))))
def test_whatever_stands_there_is_a_trace_within_the_image_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        trace = trace_of_property(text, IMAGE)
        assert all(0 <= unit < IMAGE.units for unit in trace.units())
        assert trace.traced_bytes <= IMAGE.size

"""What the front answers, and the ways to spoil it.

A fault is a function from the right answer to a spoilt one, so faults combine:
`front.on("/file").respond(faults.chunked(), faults.cut(after=1000))`.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it came."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last byte asked for; None without a (simple) Range."""
        text = self.headers.get("range")
        if text is None or not text.startswith("bytes="):
            return None
        first, _, last = text.removeprefix("bytes=").partition("-")
        return (int(first), int(last)) if first.isdigit() and last.isdigit() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What goes out. `whole` is the image's all bytes where the body is a part of them."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | memoryview = b""
    whole: bytes | memoryview | None = None
    bytes_per_s: float | None = None
    cut_after: int | None = None
    is_reset: bool = False
    is_chunked: bool = False
    states_length: bool = True
    length: int | None = None
    raw: bytes | None = None
    wait_for: threading.Event | None = None


Fault = Callable[[Answer], Answer]


def status(code: int, headers: Mapping[str, str] | None = None, body: bytes = b"<html>told to</html>") -> Fault:
    """Answer `code` instead."""
    sent = {"Content-Type": "text/html", **(headers or {})}
    return lambda _answer: Answer(status=code, headers=sent, body=body)


def not_found() -> Fault:
    """Glance's own 404: with the request id that only Glance gives."""
    return status(404, {"X-Openstack-Request-Id": "req-0"})


def slow(bytes_per_s: float) -> Fault:
    """Send the body at this rate."""
    return lambda answer: replace(answer, bytes_per_s=bytes_per_s)


def cut(after: int) -> Fault:
    """Close the connection after `after` bytes of the body."""
    return lambda answer: replace(answer, cut_after=after)


def reset() -> Fault:
    """Answer nothing and reset the connection."""
    return lambda answer: replace(answer, is_reset=True)


def cut_and_reset(after: int) -> Fault:
    """Reset the connection after `after` bytes of the body."""
    return lambda answer: replace(answer, cut_after=after, is_reset=True)


def too_short(by: int = 1) -> Fault:
    """Leave out the last `by` bytes; Content-Length says so."""
    return lambda answer: replace(answer, body=answer.body[: len(answer.body) - by])


def too_long(by: int = 1) -> Fault:
    """Send `by` bytes too many; Content-Length says so."""
    return lambda answer: replace(answer, body=bytes(answer.body) + b"\xee" * by)


def whole_for_range() -> Fault:
    """Ignore the Range: 200 and everything."""

    def spoil(answer: Answer) -> Answer:
        if answer.whole is None:
            return answer
        headers = {name: value for name, value in answer.headers.items() if name != "Content-Range"}
        return replace(answer, status=200, body=answer.whole, headers=headers)

    return spoil


def whole_under_206() -> Fault:
    """Say 206 and the right Content-Range, and send everything."""
    return lambda answer: replace(answer, body=answer.body if answer.whole is None else answer.whole)


def content_range(text: str | None) -> Fault:
    """Send this Content-Range, or none."""

    def spoil(answer: Answer) -> Answer:
        headers = {name: value for name, value in answer.headers.items() if name != "Content-Range"}
        return replace(answer, headers=headers if text is None else {**headers, "Content-Range": text})

    return spoil


def header(name: str, value: str) -> Fault:
    """Send one more header."""
    return lambda answer: replace(answer, headers={**answer.headers, name: value})


def chunked() -> Fault:
    """Send the body in chunks, without a Content-Length."""
    return lambda answer: replace(answer, is_chunked=True)


def unsized() -> Fault:
    """Send the body without a Content-Length; the end of the connection is its end."""
    return lambda answer: replace(answer, states_length=False)


def states_length(length: int) -> Fault:
    """Lie about the Content-Length; the body stays what it is."""
    return lambda answer: replace(answer, length=length)


def other_bytes() -> Fault:
    """Send as many bytes as asked for, but wrong ones."""
    return lambda answer: replace(answer, body=bytes(byte ^ 0x55 for byte in answer.body))


def garbage(raw: bytes = b"\x00\xff no HTTP at all\r\n\r\n") -> Fault:
    """Send these bytes instead of an HTTP answer."""
    return lambda answer: replace(answer, raw=raw)


def hang(release: threading.Event) -> Fault:
    """Answer nothing until `release` is set (or the front closes), then as if nothing had been."""
    return lambda answer: replace(answer, wait_for=release)

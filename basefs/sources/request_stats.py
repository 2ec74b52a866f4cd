"""Requests to Glance and Keystone, counted where they are made."""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from basefs.core.histogram import DurationHistogram

RequestKind = Literal["range", "stream", "metadata", "auth"]

NO_ANSWER = "none"
"""Stands for the status of a request that got no answer: no connection, a time-out, a connection that was cut."""


def request_kind(url: str, headers: Mapping[str, Any] | None, *, is_to_glance: bool) -> RequestKind:
    """What a request is for: bytes by Range, a whole image, metadata; or it goes to Keystone."""
    if not is_to_glance:
        return "auth"
    if not url.endswith("/file"):
        return "metadata"
    return "range" if headers and "Range" in headers else "stream"


class HttpStats:
    """Counted in any thread. Durations are those to the answer's head; bodies are read later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[RequestKind, str]] = Counter()
        self._durations: dict[RequestKind, DurationHistogram] = {}

    def add(self, kind: RequestKind, status: int | None, duration_s: float) -> None:
        """One request has ended; `status` is None where no answer came."""
        with self._lock:
            self._counts[kind, NO_ANSWER if status is None else str(status)] += 1
            self._durations.setdefault(kind, DurationHistogram()).add(duration_s)

    def counts(self) -> dict[tuple[RequestKind, str], int]:
        """Requests by kind and status."""
        with self._lock:
            return dict(self._counts)

    def durations(self) -> dict[RequestKind, DurationHistogram]:
        """How long answers took to begin, by kind."""
        with self._lock:
            return {kind: histogram.copy() for kind, histogram in self._durations.items()}

"""A web server's files in memory, with ranges, ETags and If-Match, as nginx has them; a `Route` of a front."""

import hashlib
import threading

from tests.fakes.answers import Answer, Request
from tests.fakes.front import Route

DATE = "Fri, 27 Nov 2026 08:00:00 GMT"


class MemoryWeb(Route):
    """Files by path; may be changed while it serves. `gives_etag` and `gives_date`: what tells files apart."""

    def __init__(self) -> None:
        self.gives_etag = self.gives_date = True
        self.is_weak = False
        self._files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, path: str, data: bytes) -> str:
        """Have a file there; its path."""
        with self._lock:
            self._files[path] = data
        return path

    def remove(self, path: str) -> None:
        """Have none there."""
        with self._lock:
            del self._files[path]

    def answer(self, request: Request) -> Answer:
        """See `Route`."""
        with self._lock:
            data = self._files.get(request.path)
        if data is None:
            return Answer(status=404)
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"Content-Type": "application/octet-stream"}
        if self.gives_etag:
            headers["ETag"] = f"W/{tag}" if self.is_weak else tag
        if self.gives_date:
            headers["Last-Modified"] = DATE
        if request.headers.get("if-match", tag) != tag:
            return Answer(status=412, headers=headers)
        asked = request.range
        if asked is None:
            return Answer(status=200, headers=headers, body=memoryview(data), whole=memoryview(data))
        if asked[0] >= len(data) or asked[0] > asked[1]:
            return Answer(status=416, headers={**headers, "Content-Range": f"bytes */{len(data)}"})
        first, last = asked[0], min(asked[1], len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return Answer(status=206, headers=headers, body=memoryview(data)[first : last + 1], whole=memoryview(data))

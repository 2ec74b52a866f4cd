"""A small Glance v2 in memory: list with pages and filters, show, file with ranges. Statuses are those of Glance 33."""

import hashlib
import json
import threading
import urllib.parse
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.fakes.answers import Answer, Request

_TEXT_FIELDS = (
    "id name status visibility owner disk_format container_format checksum os_hash_algo os_hash_value created_at "
    "updated_at self file schema img_signature"
)
SCHEMA = {
    "name": "image",
    "properties": {
        **{name: {"type": ["null", "string"]} for name in _TEXT_FIELDS.split()},
        "size": {"type": ["null", "integer"]},
        "os_hidden": {"type": "boolean"},
        "protected": {"type": "boolean"},
    },
    "additionalProperties": {"type": "string"},
    "links": [],
}
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


class MemoryGlance:
    """Images in memory; may be changed while it serves."""

    def __init__(self) -> None:
        self.images: dict[str, dict[str, Any]] = {}
        self.data: dict[str, bytes] = {}
        self.locations: dict[str, list[str]] = {}
        """What services are told of images' locations."""
        self._lock = threading.Lock()
        # Every change one second later than the one before: the order of times is the order of events.
        self._clock = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=10)

    def add(self, data: bytes | None, **fields: Any) -> str:
        """Make an image, active unless `data` is None; its id."""
        image_id = fields.pop("id", None) or str(uuid.uuid4())
        now = self._tick()
        image = {
            "id": image_id,
            "name": "image",
            "status": "queued" if data is None else "active",
            "visibility": "public",
            "owner": "demo1",
            "disk_format": "raw",
            "container_format": "bare",
            "size": None if data is None else len(data),
            "checksum": None if data is None else hashlib.md5(data).hexdigest(),
            "os_hash_algo": None if data is None else "sha512",
            "os_hash_value": None if data is None else hashlib.sha512(data).hexdigest(),
            "os_hidden": False,
            "created_at": now,
            "updated_at": now,
            "self": f"/v2/images/{image_id}",
            "schema": "/v2/schemas/image",
            **fields,
        }
        with self._lock:
            self.images[image_id] = image
            if data is not None:
                self.data[image_id] = data
        return image_id

    def change(self, image_id: str, **fields: Any) -> None:
        """Change fields; `updated_at` moves on."""
        now = self._tick()
        with self._lock:
            self.images[image_id] = {**self.images[image_id], "updated_at": now, **fields}

    def delete(self, image_id: str) -> None:
        """Delete the image."""
        with self._lock:
            del self.images[image_id]
            self.data.pop(image_id, None)

    def answer(self, request: Request) -> Answer:
        """What Glance says, with the request id that it puts on everything."""
        answer = self._answer(request)
        return replace(answer, headers={**answer.headers, "X-Openstack-Request-Id": f"req-{uuid.uuid4()}"})

    def _answer(self, request: Request) -> Answer:
        parts = request.path.strip("/").split("/")
        if request.method != "GET" or parts[0] != "v2":
            return _error(404, "no such thing")
        if parts[1:] == ["schemas", "image"]:
            return _json(SCHEMA)
        if parts[1:] == ["images"]:
            return self._list(dict(urllib.parse.parse_qsl(request.query)))
        if len(parts) not in (3, 4) or parts[1] != "images":
            return _error(404, "no such thing")
        image_id = urllib.parse.unquote(parts[2])
        with self._lock:
            image = self.images.get(image_id)
        if image is None:
            return _error(404, f"No image found with ID {image_id}")
        if parts[3:] == ["locations"]:
            return _json([{"url": url, "metadata": {}} for url in self.locations.get(image_id, [])])
        return _json(image) if len(parts) == 3 else self._file(image, request)

    def _tick(self) -> str:
        with self._lock:
            self._clock += timedelta(seconds=1)
            return self._clock.strftime(TIME_FORMAT)

    def _list(self, query: dict[str, str]) -> Answer:
        is_hidden = query.get("os_hidden", "false") == "true"
        since = query.get("updated_at", "gte:").removeprefix("gte:")
        with self._lock:
            images = [
                image
                for image in self.images.values()
                if image["os_hidden"] is is_hidden and image["updated_at"] >= since
            ]
        images.sort(key=lambda image: (image["created_at"], image["id"]))
        if "sort" not in query:
            images.reverse()
        marker = query.get("marker")
        if marker is not None:
            ids = [image["id"] for image in images]
            if marker not in ids:
                return _error(400, f"No image found with ID {marker}")
            images = images[ids.index(marker) + 1 :]
        limit = int(query.get("limit", 25))
        page: dict[str, Any] = {"images": images[:limit], "first": "/v2/images", "schema": "/v2/schemas/images"}
        if len(images) > limit:
            more = {**query, "marker": images[limit - 1]["id"]}
            page["next"] = f"/v2/images?{urllib.parse.urlencode(more)}"
        return _json(page)

    def _file(self, image: dict[str, Any], request: Request) -> Answer:
        if image["status"] == "deactivated":
            return _error(403, "The requested image has been deactivated. Image data download is forbidden.")
        data = self.data.get(image["id"])
        if data is None:
            return Answer(status=204)
        headers = {"Content-Type": "application/octet-stream"}
        if "range" not in request.headers:
            return Answer(status=200, headers=headers, body=memoryview(data), whole=memoryview(data))
        asked = request.range
        if asked is None or asked[0] >= len(data) or asked[0] > asked[1]:
            return _error(416, "Invalid Range header")
        first, last = asked[0], min(asked[1], len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        view = memoryview(data)
        return Answer(status=206, headers=headers, body=view[first : last + 1], whole=view)


def _json(value: Any) -> Answer:
    return Answer(status=200, headers={"Content-Type": "application/json"}, body=json.dumps(value).encode())


def _error(code: int, text: str) -> Answer:
    body = f"<html>\n <head>\n  <title>{code}</title>\n </head>\n <body>{text}<br />\n </body>\n</html>".encode()
    return Answer(status=code, headers={"Content-Type": "text/html; charset=UTF-8"}, body=body)

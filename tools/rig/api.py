"""The few calls of the Glance and Keystone APIs that the rig and its users need, by http.client alone."""

import contextlib
import http.client
import json
import os
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

MIB = 1 << 20
_TIMEOUT_S = 600.0
_JSON_PATCH = "application/openstack-images-v2.1-json-patch"


class ApiError(Exception):
    """An answer that is no success; `status` is the HTTP status."""

    def __init__(self, method: str, path: str, status: int, body: bytes) -> None:
        super().__init__(f"{method} {path}: {status} {body[:300].decode(errors='replace')}")
        self.status = status


class Api:
    """JSON over HTTP to one service."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._parts = urllib.parse.urlsplit(self.url)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> tuple[http.client.HTTPMessage, Any]:
        """Return the answer's headers and its body, parsed if it is JSON; ApiError for 400 and above.

        A dict or list in `body` goes as JSON; bytes, or a file opened for reading, go as they are.
        """
        data: Any = json.dumps(body).encode() if isinstance(body, dict | list) else body
        sent = {"Content-Type": content_type, **(headers or {})}
        if hasattr(data, "fileno"):
            sent["Content-Length"] = str(os.fstat(data.fileno()).st_size)
        connection = http.client.HTTPConnection(
            self._parts.hostname or "", self._parts.port, timeout=_TIMEOUT_S, blocksize=MIB
        )
        with contextlib.closing(connection):
            connection.request(method, self._parts.path + path, body=data, headers=sent)
            answer = connection.getresponse()
            content = answer.read()
        if answer.status >= 400:
            raise ApiError(method, path, answer.status, content)
        is_json = answer.headers.get_content_type() == "application/json" and content
        return answer.headers, json.loads(content) if is_json else content


class GlanceApi(Api):
    """Images, by the real API, as the holder of `token` (None: no token, the fake-auth admin)."""

    def __init__(self, url: str, token: str | None = None) -> None:
        super().__init__(url)
        self._headers = {"X-Auth-Token": token} if token else {}

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> tuple[http.client.HTTPMessage, Any]:
        """As Api.call, with the token."""
        return super().call(method, path, body, headers={**self._headers, **(headers or {})}, content_type=content_type)

    def create(self, name: str, disk_format: str | None = "raw", **properties: Any) -> str:
        """Make an image record, status queued; returns its id. `id`, `visibility` and so on go as properties."""
        record = {"name": name, "disk_format": disk_format, "container_format": "bare", **properties}
        if disk_format is None:
            del record["disk_format"], record["container_format"]
        return str(self.call("POST", "/v2/images", record)[1]["id"])

    def put_data(self, image_id: str, data: bytes | IO[bytes], store: str | None = None) -> None:
        """Upload the image's bytes; the image is active afterwards."""
        self.call(
            "PUT",
            f"/v2/images/{image_id}/file",
            data,
            headers={"X-Image-Meta-Store": store} if store else None,
            content_type="application/octet-stream",
        )

    def upload(
        self,
        source: bytes | str | os.PathLike[str],
        name: str,
        disk_format: str = "raw",
        *,
        store: str | None = None,
        **props: Any,
    ) -> str:
        """Make an image of these bytes, or of the file at this path, in this store; returns its id."""
        image_id = self.create(name, disk_format, **props)
        if isinstance(source, bytes):
            self.put_data(image_id, source, store)
        else:
            with open(source, "rb") as data:
                self.put_data(image_id, data, store)
        return image_id

    def upload_many(self, sources: list[tuple[str, bytes]], threads: int = 4, **props: Any) -> list[str]:
        """Upload (name, bytes) pairs side by side; returns the ids in the same order."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda pair: self.upload(pair[1], pair[0], **props), sources))

    def get(self, image_id: str) -> dict[str, Any]:
        """Return the image's record."""
        record: dict[str, Any] = self.call("GET", f"/v2/images/{image_id}")[1]
        return record

    def patch(self, image_id: str, *changes: dict[str, Any]) -> None:
        """Apply JSON-patch operations."""
        self.call(
            "PATCH",
            f"/v2/images/{image_id}",
            list(changes),
            content_type="application/openstack-images-v2.1-json-patch",
        )

    def set(self, image_id: str, **properties: Any) -> None:
        """Set properties; those that are there are replaced."""
        have = self.get(image_id)
        self.patch(
            image_id,
            *(
                {"op": "replace" if name in have else "add", "path": f"/{name}", "value": value}
                for name, value in properties.items()
            ),
        )

    def add_location(self, image_id: str, url: str, store: str | None = None) -> None:
        """Make the bytes at `url` the image's; it is active afterwards, with no hashes."""
        metadata = {"store": store} if store else {}
        self.patch(image_id, {"op": "add", "path": "/locations/-", "value": {"url": url, "metadata": metadata}})

    def action(self, image_id: str, name: str) -> None:
        """`deactivate` or `reactivate`."""
        self.call("POST", f"/v2/images/{image_id}/actions/{name}")

    def delete(self, image_id: str) -> None:
        """Delete the image."""
        self.call("DELETE", f"/v2/images/{image_id}")

    def list(self) -> list[dict[str, Any]]:
        """Return every image this token can see by plain listing."""
        found: list[dict[str, Any]] = []
        path: str | None = "/v2/images?limit=200"
        while path:
            page = self.call("GET", path)[1]
            found += page["images"]
            path = page.get("next")
        return found

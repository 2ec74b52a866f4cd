"""The calls of the Cinder API that the rig and its users need, by http.client alone."""

import http.client
import time
from typing import Any

from tools.rig.api import Api
from tools.rig.processes import RigError

_MICROVERSION = "volume 3.71"
_SETTLE_S = 60.0


class CinderApi(Api):
    """Volumes and attachments, by the real API (`url` ends in /v3), as the holder of `token`."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url)
        self._headers = {"X-Auth-Token": token, "OpenStack-API-Version": _MICROVERSION}

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> tuple[http.client.HTTPMessage, Any]:
        """As Api.call, with the token and the micro version."""
        return super().call(method, path, body, headers={**self._headers, **(headers or {})}, content_type=content_type)

    def volumes(self) -> list[dict[str, Any]]:
        """Return every volume of every project."""
        found: list[dict[str, Any]] = self.call("GET", "/volumes/detail?all_tenants=1")[1]["volumes"]
        return found

    def volume(self, volume_id: str) -> dict[str, Any]:
        """Return a volume's record."""
        record: dict[str, Any] = self.call("GET", f"/volumes/{volume_id}")[1]["volume"]
        return record

    def wait_for(self, volume_id: str, *statuses: str) -> dict[str, Any]:
        """Return the volume's record as soon as its status is one of these; RigError when it does not come to that."""
        deadline = time.monotonic() + _SETTLE_S
        while (record := self.volume(volume_id))["status"] not in statuses:
            if record["status"].startswith("error") or time.monotonic() > deadline:
                raise RigError(f"volume {volume_id} is {record['status']}, not {' or '.join(statuses)}")
            time.sleep(0.05)
        return record

    def create_volume(self, size_gib: int, volume_type: str, **fields: Any) -> str:
        """Make a volume and wait until it is available; `fields` as the API has them: `name`, `metadata`, …"""
        body = {"volume": {"size": size_gib, "volume_type": volume_type, **fields}}
        volume_id = str(self.call("POST", "/volumes", body)[1]["volume"]["id"])
        self.wait_for(volume_id, "available")
        return volume_id

    def delete_volume(self, volume_id: str) -> None:
        """Ask for the volume's end; it is gone a little later."""
        self.call("DELETE", f"/volumes/{volume_id}")

    def set_metadata(self, volume_id: str, **metadata: str) -> None:
        """Set metadata; what else is there stays."""
        self.call("POST", f"/volumes/{volume_id}/metadata", {"metadata": metadata})

    def action(self, volume_id: str, name: str, **arguments: Any) -> None:
        """Do an action: `os-reset_status`, `os-force_delete`, `os-update_readonly_flag` and so on."""
        self.call("POST", f"/volumes/{volume_id}/action", {name: arguments})

    def attachments(self) -> list[dict[str, Any]]:
        """Return every attachment of every project, connection_info too."""
        found: list[dict[str, Any]] = self.call("GET", "/attachments/detail?all_tenants=1")[1]["attachments"]
        return found

    def delete_attachment(self, attachment_id: str) -> None:
        """Delete an attachment, as an operator would under its user's feet."""
        self.call("DELETE", f"/attachments/{attachment_id}")

    def create_type(self, name: str, **extra_specs: str) -> None:
        """Make a volume type; one that is there already stays as it is."""
        have = {one["name"] for one in self.call("GET", "/types?is_public=None")[1]["volume_types"]}
        if name not in have:
            self.call("POST", "/types", {"volume_type": {"name": name, "extra_specs": extra_specs}})

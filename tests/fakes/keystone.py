"""A Keystone that issues password tokens of any life and counts them; below `/identity` of a `MisbehavingFront`."""

import itertools
import json
from datetime import UTC, datetime, timedelta

from tests.fakes.answers import Answer, Request
from tests.fakes.front import MisbehavingFront, Route
from tools.secrets_used import FAKE_PASSWORD, FAKE_TOKEN_PREFIX


class FakeKeystone(Route):
    """Issues tokens that are good at the front's Glance until they are revoked."""

    def __init__(self, front: MisbehavingFront, *, life_s: float = 3600.0, password: str = FAKE_PASSWORD) -> None:
        self.issued: list[str] = []
        self.life_s = life_s
        self._front = front
        self._password = password
        self._numbers = itertools.count(1)
        front.extra_routes["/identity"] = self
        front.tokens = set()

    def conf_lines(self, **changes: str) -> str:
        """The [glance] section of a basefs.conf with password auth here."""
        options = {
            "auth_type": "password",
            "auth_url": f"{self._front.url}/identity/v3",
            "username": "basefs",
            "password": self._password,
            "project_name": "service",
            "user_domain_id": "default",
            "project_domain_id": "default",
            "region_name": "RegionOne",
            **changes,
        }
        return "[glance]\n" + "".join(f"{name} = {value}\n" for name, value in options.items())

    def revoke(self) -> None:
        """Make all tokens bad ones, long before they expire."""
        self._front.tokens = set()

    def answer(self, request: Request) -> Answer:
        """Version discovery and tokens."""
        if request.path == "/identity/v3/auth/tokens" and request.method == "POST":
            return self._token(json.loads(request.body)["auth"])
        links = [{"rel": "self", "href": f"{self._front.url}/identity/v3/"}]
        return _json(200, {"version": {"id": "v3.14", "status": "stable", "links": links}})

    def _token(self, auth: dict) -> Answer:
        if auth["identity"]["password"]["user"]["password"] != self._password:
            error = {"code": 401, "title": "Unauthorized", "message": "The request requires authentication."}
            return _json(401, {"error": error})
        token = f"{FAKE_TOKEN_PREFIX}{next(self._numbers)}"
        self.issued.append(token)
        self._front.tokens = {*(self._front.tokens or ()), token}
        now = datetime.now(UTC)
        catalog = [
            {
                "type": "image",
                "name": "glance",
                "id": "1",
                "endpoints": [
                    {
                        "id": i,
                        "interface": i,
                        "region": "RegionOne",
                        "region_id": "RegionOne",
                        "url": self._front.url + "/v2/",
                    }
                    for i in ("public", "internal")
                ],
            }
        ]
        body = {
            "methods": ["password"],
            "user": {"id": "u-1", "name": "basefs", "domain": {"id": "default", "name": "Default"}},
            "project": {"id": "p-1", "name": "service", "domain": {"id": "default", "name": "Default"}},
            "roles": [{"id": "1", "name": "reader"}, {"id": "2", "name": "service"}],
            "issued_at": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "expires_at": (now + timedelta(seconds=self.life_s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "catalog": catalog,
        }
        return _json(201, {"token": body}, {"X-Subject-Token": token})


def _json(status: int, value: object, headers: dict[str, str] | None = None) -> Answer:
    sent = {"Content-Type": "application/json", **(headers or {})}
    return Answer(status=status, headers=sent, body=json.dumps(value).encode())

"""Paste filter: X-Auth-Token "user:project:role,role" becomes the headers that Keystone's middleware would set.

Stands in for keystonemiddleware.auth_token in a rig without Keystone; the stock `context` filter follows it. Without a
token the request is $RIG_ANON's (same form); so it is with keystoneauth's for `auth_type = none`, where the paste file
says `anonymous`. A token listed in the file $RIG_EXPIRED (one a line) has expired: 401.
Glance's cinder store knows no other way than passwords: POST /auth/tokens answers as Keystone would, with such a token.
"""

import json
import os
from typing import Any

from tools.rig.identity import USERS

_STRIP = (
    "HTTP_X_IDENTITY_STATUS",
    "HTTP_X_USER_ID",
    "HTTP_X_PROJECT_ID",
    "HTTP_X_ROLES",
    "HTTP_X_SERVICE_CATALOG",
    "HTTP_X_USER_NAME",
    "HTTP_X_PROJECT_NAME",
)


class FakeAuth:
    """The filter; `environ` is changed in place, as auth_token does it."""

    def __init__(self, app: Any, anonymous: str | None) -> None:
        self.app = app
        self.anonymous = anonymous

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "POST" and environ["PATH_INFO"] == "/auth/tokens":
            return issue_token(environ, start_response)
        for key in _STRIP:
            environ.pop(key, None)
        token = environ.get("HTTP_X_AUTH_TOKEN")
        if token in (None, self.anonymous) and os.environ.get("RIG_ANON"):
            token = environ["HTTP_X_AUTH_TOKEN"] = os.environ["RIG_ANON"]
        expired = os.environ.get("RIG_EXPIRED")
        if token and expired and os.path.exists(expired):
            with open(expired, encoding="ascii") as lines:
                if token in lines.read().split("\n"):
                    token = None
        if token and token.count(":") == 2:
            user, project, roles = token.split(":")
            environ["HTTP_X_IDENTITY_STATUS"] = "Confirmed"
            environ["HTTP_X_USER_ID"] = environ["HTTP_X_USER_NAME"] = user
            environ["HTTP_X_PROJECT_ID"] = environ["HTTP_X_PROJECT_NAME"] = project
            environ["HTTP_X_ROLES"] = roles
            environ["HTTP_X_SERVICE_CATALOG"] = "[]"
        return self.app(environ, start_response)


def issue_token(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Answer to a password, any of them, with the user's token and a catalog of this one service."""
    asked = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    name = asked["auth"]["identity"]["password"]["user"]["name"]
    project, roles = USERS[name]
    url = f"http://{environ['HTTP_HOST']}{environ['SCRIPT_NAME']}"
    endpoint = {"interface": "public", "region": "RegionOne", "region_id": "RegionOne", "url": url, "id": "cinder"}
    token = {
        "methods": ["password"],
        "user": {"id": name, "name": name, "domain": {"id": "default", "name": "Default"}},
        "project": {"id": project, "name": project, "domain": {"id": "default", "name": "Default"}},
        "roles": [{"id": role, "name": role} for role in roles],
        "catalog": [{"type": "block-storage", "name": "cinder", "id": "cinder", "endpoints": [endpoint]}],
        "issued_at": "2026-01-01T00:00:00.000000Z",
        "expires_at": "2096-01-01T00:00:00.000000Z",
    }
    body = json.dumps({"token": token}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    headers.append(("X-Subject-Token", f"{name}:{project}:{','.join(roles)}"))
    start_response("201 Created", headers)
    return [body]


def filter_factory(_global_conf: Any, anonymous: str | None = None, **_local: Any) -> Any:
    """Paste's entry point."""
    return lambda app: FakeAuth(app, anonymous)

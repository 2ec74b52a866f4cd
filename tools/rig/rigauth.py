"""Paste filter: X-Auth-Token "user:project:role,role" becomes the headers that Keystone's middleware would set.

Stands in for keystonemiddleware.auth_token in a rig without Keystone; the stock `context` filter follows it. Without a
token the request is $RIG_ANON's (same form). A token listed in the file $RIG_EXPIRED (one a line) has expired: 401.
"""

import os
from typing import Any

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

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        for key in _STRIP:
            environ.pop(key, None)
        token = environ.get("HTTP_X_AUTH_TOKEN")
        if token is None and os.environ.get("RIG_ANON"):
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


def filter_factory(_global_conf: Any, **_local: Any) -> type[FakeAuth]:
    """Paste's entry point."""
    return FakeAuth

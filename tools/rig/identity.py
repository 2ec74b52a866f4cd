"""What a Keystone of the rig holds: projects, users, roles, the catalog; and how to get tokens from it."""

import uuid
from typing import Any

from tools.rig.api import Api
from tools.secrets_used import RIG_PASSWORD

PASSWORD = RIG_PASSWORD
ADMIN_USER = "admin"
# user: (project, roles); `basefs` is the service user an operator would make for basefs, `basefs-service` one without
# the admin role.
USERS = {
    "glance": ("service", ("admin", "service")),
    "cinder": ("service", ("admin", "service")),
    "basefs": ("service", ("admin", "service")),
    "basefs-service": ("service", ("service", "member", "reader")),
    "u1": ("demo1", ("member", "reader")),
    "u2": ("demo2", ("member", "reader")),
}


class Keystone:
    """The identity API of one rig, at `url` (…/v3)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._api = Api(url)

    def token(self, user: str = ADMIN_USER, project: str | None = None) -> str:
        """Return a fresh token, scoped to the user's project unless another is named."""
        scope = project or (USERS[user][0] if user in USERS else "admin")
        headers, _ = self._api.call(
            "POST",
            "/auth/tokens",
            {
                "auth": {
                    "identity": {
                        "methods": ["password"],
                        "password": {"user": {"name": user, "domain": {"id": "default"}, "password": PASSWORD}},
                    },
                    "scope": {"project": {"name": scope, "domain": {"id": "default"}}},
                }
            },
        )
        return str(headers["X-Subject-Token"])

    def populate(self) -> None:
        """Make the projects and users above."""
        headers = {"X-Auth-Token": self.token()}
        roles = {role["name"]: role["id"] for role in self._call("GET", "/roles", headers)["roles"]}
        projects: dict[str, str] = {}
        for name in sorted({project for project, _ in USERS.values()}):
            body = {"project": {"name": name, "domain_id": "default"}}
            projects[name] = self._call("POST", "/projects", headers, body)["project"]["id"]
        for name, (project, names) in USERS.items():
            body = {"user": {"name": name, "password": PASSWORD, "domain_id": "default"}}
            user_id = self._call("POST", "/users", headers, body)["user"]["id"]
            for role in names:
                self._call("PUT", f"/projects/{projects[project]}/users/{user_id}/roles/{roles[role]}", headers)

    def register(self, service_type: str, url: str) -> None:
        """Enter a service in the catalog, region RegionOne, all three interfaces."""
        headers = {"X-Auth-Token": self.token()}
        body: dict[str, Any] = {"service": {"type": service_type, "name": service_type}}
        service_id = self._call("POST", "/services", headers, body)["service"]["id"]
        for interface in ("public", "internal", "admin"):
            endpoint = {"service_id": service_id, "interface": interface, "url": url, "region_id": "RegionOne"}
            self._call("POST", "/endpoints", headers, {"endpoint": endpoint})

    def application_credential(self, user: str = "basefs") -> tuple[str, str]:
        """Return id and secret of a new application credential of `user`."""
        headers = {"X-Auth-Token": self.token(user)}
        me = self._call("GET", "/auth/tokens", {**headers, "X-Subject-Token": headers["X-Auth-Token"]})
        user_id = me["token"]["user"]["id"]
        body = {"application_credential": {"name": uuid.uuid4().hex}}
        made = self._call("POST", f"/users/{user_id}/application_credentials", headers, body)
        return made["application_credential"]["id"], made["application_credential"]["secret"]

    def _call(self, method: str, path: str, headers: dict[str, str], body: Any = None) -> Any:
        return self._api.call(method, path, body, headers=headers)[1]

"""`auth_type = none`, as basefs means it."""

from typing import Any

from keystoneauth1 import noauth, plugin


class Anonymous(noauth.NoAuth):
    """Sends no token at all; keystoneauth's own plugin sends "notused", which a service may refuse."""

    def get_headers(self, session: Any) -> dict[str, str]:  # noqa: ANN401, ARG002  (keystoneauth's signature)
        """No headers."""
        return {}


def without_token(auth: plugin.BaseAuthPlugin | None) -> plugin.BaseAuthPlugin | None:
    """The plugin, or ours in place of keystoneauth's for `auth_type = none`."""
    return Anonymous(endpoint=auth.endpoint) if isinstance(auth, noauth.NoAuth) else auth

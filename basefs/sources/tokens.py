"""How long Keystone's token is good, by a clock that nobody sets.

keystoneauth compares Keystone's `expires_at` with this node's wall clock: on a node whose clock is an hour ahead each
request would fetch a token of its own. Here a token's life is what Keystone says it is (`expires_at` less
`issued_at`), from the moment it came.
"""

import math
from datetime import UTC, datetime
from time import monotonic

from keystoneauth1 import access
from keystoneauth1.identity.base import BaseIdentityPlugin


class TokenLife:
    """Decides for one auth plugin when it renews its token. Used from threads, under the plugin's own lock."""

    def __init__(self, auth: BaseIdentityPlugin) -> None:
        self.is_stretched = False
        """Keystone is away: a token is used to its end, not renewed somewhat before."""
        self._auth = auth
        self._known: access.AccessInfo | None = None
        self._ends_at = 0.0
        # The plugin's seam for just this question; it has no public one.
        auth._needs_reauthenticate = self.needs_renewal  # type: ignore[method-assign]  # noqa: SLF001

    def needs_renewal(self) -> bool:
        """Whether the next request must fetch a token first."""
        auth = self._auth
        if auth.auth_ref and not auth.reauthenticate:
            return False
        return self.ends_in_s() <= (0 if self.is_stretched else auth.MIN_TOKEN_LIFE_SECONDS)

    def ends_in_s(self) -> float:
        """Seconds for which the token is good; 0 or less: there is none that is."""
        token = self._auth.auth_ref
        if token is None:
            return 0.0
        if token is not self._known:
            issued, expires = token.issued or datetime.now(UTC), token.expires
            life_s = math.inf if expires is None else (expires - issued).total_seconds()
            self._known, self._ends_at = token, monotonic() + life_s
        return self._ends_at - monotonic()

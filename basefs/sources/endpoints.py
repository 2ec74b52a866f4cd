"""Whether Glance and Keystone are there: a breaker for each, the probes that decide, and the one outage they make.

While an endpoint is away no ordinary request goes out; one probe at a time does. Keystone away is an outage only
once there is no token that is good. Owned by the trio loop, but for `Endpoint.alive_at`, which threads write.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from basefs import errors
from basefs.concurrency.exchange import EndpointName, Exchange, run_interruptibly
from basefs.concurrency.outage import Outage
from basefs.concurrency.threads import BlockingCalls
from basefs.core.breaker import Breaker

log = logging.getLogger(__name__)

PROBE_LIMIT_S: Mapping[EndpointName, float] = {"glance": 2.5, "keystone": 5.0}
"""Longest a probe may take. Keystone's issues a token, for which it hashes a password."""
_TITLES: Mapping[EndpointName, str] = {"glance": "Glance", "keystone": "Keystone"}
_STATES = {"closed": "answers", "suspected": "suspected", "open": "away"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """How the last contact with Glance ended. `reachable` is None before the first one.

    `error` and `error_at` (Unix time) are those of the last failure, also after Glance came back.
    """

    reachable: bool | None = None
    error: str | None = None
    error_at: float | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Endpoint:
    """One of the two. `alive_at` is `time.monotonic()` of the last sign of life; `since` is Unix time, for people."""

    name: EndpointName
    probe: Callable[[], None]
    breaker: Breaker
    alive_at: float = float("-inf")
    failed_at: float = float("-inf")
    since: float | None = None
    error: str | None = None
    changed: trio.Event = field(default_factory=trio.Event)

    def has_shown_life(self) -> bool:
        """Whether anything came since the last ordinary failure."""
        return self.alive_at > self.failed_at


class Endpoints:
    """Both endpoints. `probes` has the blocking probe of each endpoint that there is; a probe raises our errors.

    `watch` must run for an outage ever to begin or end.
    """

    def __init__(
        self,
        probes: Mapping[EndpointName, Callable[[], None]],
        *,
        has_token: Callable[[], bool],
        changed: Callable[[EndpointName], None],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.outage = Outage()
        self.contact = Contact()
        self._has_token = has_token
        self._changed = changed
        self._threads = BlockingCalls("probes", threads_max=len(probes))
        self._endpoints = {
            name: Endpoint(name=name, probe=probe, breaker=Breaker(jitter)) for name, probe in probes.items()
        }

    def __getitem__(self, name: EndpointName) -> Endpoint:
        return self._endpoints.get(name) or self._endpoints["glance"]

    def check(self) -> None:
        """Return if a request may be made now.

        Raises:
            SourceUnavailableError: an outage is on.
        """
        self._decide()  # a token may have ended meanwhile
        self.outage.check()

    def failed(self, name: EndpointName, error: errors.SourceUnavailableError) -> None:
        """An ordinary request failed as if the endpoint were away: a probe will tell."""
        endpoint = self[name]
        endpoint.failed_at = time.monotonic()
        endpoint.error = str(error)
        endpoint.breaker.failed(trio.current_time())
        self._moved(endpoint)

    def answered(self, name: EndpointName) -> None:
        """The endpoint answered something."""
        endpoint = self[name]
        if endpoint.breaker.state != "closed":
            is_back = endpoint.breaker.state == "open"
            away_s = trio.current_time() - endpoint.breaker.since
            endpoint.breaker.answered(trio.current_time())
            if is_back:
                waited = self.outage.waited
                log.info("%s is back after %.0f s; %d reads waited for it", _TITLES[endpoint.name], away_s, waited)
                endpoint.since = time.time()
            if name == "glance":
                self.contact = Contact(reachable=True, error=self.contact.error, error_at=self.contact.error_at)
            self._moved(endpoint)

    def report(self) -> dict[str, Any]:
        """State, since when and last error of each, for people. `since` is Unix time, None since the beginning."""
        return {
            name: {"state": _STATES[endpoint.breaker.state], "since": endpoint.since, "error": endpoint.error}
            for name, endpoint in self._endpoints.items()
        }

    # --- probes ---------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Probe what is suspected or away. Runs until it is cancelled."""
        async with trio.open_nursery() as nursery:
            for endpoint in self._endpoints.values():
                nursery.start_soon(self._watch, endpoint)

    async def _watch(self, endpoint: Endpoint) -> None:
        while True:
            changed = endpoint.changed
            with trio.move_on_at(endpoint.breaker.probe_at) as due:
                await changed.wait()
            if due.cancelled_caught:
                await self._probe(endpoint)

    async def _probe(self, endpoint: Endpoint) -> None:
        exchange = Exchange()
        error: errors.BasefsError | None = None
        with trio.move_on_after(PROBE_LIMIT_S[endpoint.name]) as limit:
            try:
                await run_interruptibly(self._threads, endpoint.probe, exchange=exchange)
            except errors.BasefsError as exc:
                error = exc
        if limit.cancel_called:
            text = f"no answer to a probe within {PROBE_LIMIT_S[endpoint.name]:g} s"
            error = errors.SourceUnavailableError(text, may_be_away=True)
        is_away = isinstance(error, errors.SourceUnavailableError) and error.may_be_away
        if not is_away or endpoint.has_shown_life():
            self.answered(endpoint.name)
            return
        assert isinstance(error, errors.SourceUnavailableError)
        if self[exchange.endpoint] is not endpoint:
            # Glance cannot be asked without a token: who has to come back first is Keystone.
            self.failed(exchange.endpoint, error)
            endpoint.breaker.put_off(trio.current_time())
            return
        self._probe_failed(endpoint, error)

    def _probe_failed(self, endpoint: Endpoint, error: errors.SourceUnavailableError) -> None:
        was = endpoint.breaker.state
        endpoint.error = str(error)
        endpoint.breaker.probe_failed(trio.current_time(), retry_after_s=error.retry_after_s)
        log.debug("probe of %s failed: %s", _TITLES[endpoint.name], error)
        if was != endpoint.breaker.state == "open":
            endpoint.since = time.time() - (trio.current_time() - endpoint.breaker.since)
            log.warning(
                "%s is away: %s. What is cached is served, guests wait, and %s is asked every few seconds",
                _TITLES[endpoint.name], error, _TITLES[endpoint.name],
            )  # fmt: skip
        if endpoint.name == "glance":
            self.contact = Contact(reachable=False, error=str(error), error_at=time.time())
        self._moved(endpoint)

    # --- what follows ---------------------------------------------------------------------------------

    def _moved(self, endpoint: Endpoint) -> None:
        endpoint.changed.set()
        endpoint.changed = trio.Event()
        self._changed(endpoint.name)
        self._decide()

    def is_closed(self, name: EndpointName) -> bool:
        """Whether nothing speaks against the endpoint."""
        return self[name].breaker.state == "closed"

    def _decide(self) -> None:
        """Bring the outage in line with the breakers."""
        away = next((one for one in self._endpoints.values() if self._stops_us(one)), None)
        suspected = any(one.breaker.state == "suspected" for one in self._endpoints.values())
        if away is None:
            self.outage.end()
        elif not self.outage.is_on:
            text = f"{_TITLES[away.name]} is away: {away.error}"
            self.outage.begin(errors.SourceUnavailableError(text, may_be_away=True, is_outage=True))
        self.outage.suspect(is_suspected=suspected)

    def _stops_us(self, endpoint: Endpoint) -> bool:
        if endpoint.breaker.state != "open":
            return False
        return endpoint.name == "glance" or not self._has_token()

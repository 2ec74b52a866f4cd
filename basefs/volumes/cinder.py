"""What basefs asks of Cinder, in its words. Every error names the volume or attachment, none holds a secret."""

import http
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple
from urllib.parse import urlsplit

import requests
import urllib3
from keystoneauth1 import exceptions as ksa
from keystoneauth1 import session

from basefs import errors
from basefs.concurrency.exchange import run_interruptibly
from basefs.concurrency.grace import with_grace
from basefs.concurrency.threads import BlockingCalls
from basefs.core.safe_text import safe_text

if TYPE_CHECKING:
    from cinderclient.v3 import client

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

GIB = 1 << 30
GRACE_S = 10.0
"""Cinder answers within a second, but waits for its storage."""
BUSY_STATUSES = (400, 409)
_NOT_CINDER = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What python-cinderclient raises over an answer that is no answer of Cinder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """One of a volume's. `server_id`: nova's instance; `tag`: what we put at its mount point; known once attached."""

    attachment_id: str
    status: str
    server_id: str | None = None
    tag: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """What Cinder tells of a volume. `size` in bytes. `attached`: its complete attachments."""

    volume_id: str
    status: str
    size: int
    is_multiattach: bool
    is_encrypted: bool
    metadata: Mapping[str, str]
    attached: Sequence[Attachment]


class Cinder:
    """Calls of python-cinderclient in threads of their own.

    Every method raises VolumeGoneError (404 in Cinder's own words), VolumeBusyError (400, 409), VolumeRefusedError or
    VolumeError. Cancellation: shuts down the connection that the thread waits for; where something is to be changed
    GRACE_S later, for who changed it must know the answer.
    """

    def __init__(
        self,
        client_of: Callable[[], "client.Client"],
        cinder_session: session.Session,
        where: Mapping[str, Any],
        *,
        threads_max: int,
    ) -> None:
        self._client_of = client_of
        self._session = cinder_session
        self._where = where
        self._threads = BlockingCalls("cinder", threads_max=threads_max)
        self._made: client.Client | None = None
        self._making = threading.Lock()

    # --- volumes --------------------------------------------------------------------------------------

    async def volume(self, volume_id: str) -> Volume:
        """One volume."""
        return await self._call(f"volume {volume_id}", self._volume, volume_id)

    async def volumes_by(self, **filters: object) -> list[Volume]:
        """All volumes that we may see and that fit `filters` of Cinder's list (status, metadata)."""
        return await self._call("list of volumes", self._volumes_by, filters)

    async def clone(self, source: Volume, *, name: str, metadata: Mapping[str, str]) -> str:
        """Have a clone made; its id. It is there when its status is available."""
        return await self._change(f"clone of volume {source.volume_id}", self._clone, source, name, metadata)

    async def make_readonly(self, volume_id: str) -> None:
        """Mark the volume: attachments of it are read-only from here."""
        await self._change(f"volume {volume_id}, readonly", self._make_readonly, volume_id)

    async def delete_volume(self, volume_id: str) -> None:
        """Have the volume deleted; it is gone when Cinder does not know it any more."""
        await self._change(f"deletion of volume {volume_id}", self._delete_volume, volume_id)

    # --- attachments ----------------------------------------------------------------------------------

    async def attachments_of(self, volume_id: str) -> list[Attachment]:
        """All attachments of the volume, reserved ones too; without their tags."""
        return await self._call(f"attachments of volume {volume_id}", self._attachments_of, volume_id)

    async def reserve(self, volume_id: str) -> str:
        """A new attachment, without a connector; its id.

        In two steps, for `attachments.create` with a connector forgets the mode (api/v3/attachments.py: create).
        """
        return await self._change(f"attachment of volume {volume_id}", self._reserve, volume_id)

    async def connect(self, attachment_id: str, connector: Mapping[str, Any]) -> dict[str, Any]:
        """Have the storage give the volume to the host of the connector; the connection_info, a secret."""
        return await self._change(f"attachment {attachment_id}, connector", self._connect, attachment_id, connector)

    async def complete(self, attachment_id: str) -> None:
        """Tell that the volume is attached."""
        await self._change(f"attachment {attachment_id}, complete", self._complete, attachment_id)

    async def connection_info(self, attachment_id: str) -> dict[str, Any]:
        """The connection_info of an attachment, a secret; empty if it has no connector."""
        return await self._call(f"attachment {attachment_id}", self._connection_info, attachment_id)

    async def delete_attachment(self, attachment_id: str) -> None:
        """Have the storage take the volume away from its host, and forget the attachment."""
        await self._change(f"deletion of attachment {attachment_id}", self._delete_attachment, attachment_id)

    # --- who and where --------------------------------------------------------------------------------

    async def host_name(self) -> str:
        """The host of Cinder's endpoint: on the way there the storage finds us, too."""
        return await self._call("endpoint", self._host_name)

    async def roles(self) -> tuple[str, ...]:
        """Our roles in our project; none where the auth plugin does not know them."""
        return await self._call("who are we", self._roles)

    # --- in threads -----------------------------------------------------------------------------------

    async def _call(self, what: str, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        def call() -> T:
            with _translated(what):
                return fn(*args)

        return await run_interruptibly(self._threads, call)

    async def _change(self, what: str, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        return await with_grace(lambda: self._call(what, fn, *args), GRACE_S)

    def _client(self) -> "client.Client":
        with self._making:
            if self._made is None:
                self._made = self._client_of()
            return self._made

    def _volume(self, volume_id: str) -> Volume:
        return _volume_of(self._client().volumes.get(volume_id))

    def _volumes_by(self, filters: Mapping[str, object]) -> list[Volume]:
        # Cinder does not heed all_tenants of who is no admin.
        found = self._client().volumes.list(search_opts={**filters, "all_tenants": 1})
        return [_volume_of(one) for one in found]

    def _clone(self, source: Volume, name: str, metadata: Mapping[str, str]) -> str:
        size_gib = source.size // GIB
        made = self._client().volumes.create(size_gib, source_volid=source.volume_id, name=name, metadata=metadata)
        return str(made.id)

    def _make_readonly(self, volume_id: str) -> None:
        self._client().volumes.update_readonly_flag(volume_id, True)

    def _delete_volume(self, volume_id: str) -> None:
        self._client().volumes.delete(volume_id)

    def _attachments_of(self, volume_id: str) -> list[Attachment]:
        found = self._client().attachments.list(search_opts={"volume_id": volume_id, "all_tenants": 1})
        return [
            Attachment(attachment_id=str(one.id), status=str(one.status), server_id=one.instance)
            for one in found
            if one.volume_id == volume_id
        ]

    def _reserve(self, volume_id: str) -> str:
        return str(self._client().attachments.create(volume_id, None, None, mode="ro")["id"])

    def _connect(self, attachment_id: str, connector: Mapping[str, Any]) -> dict[str, Any]:
        found = self._client().attachments.update(attachment_id, dict(connector))
        return dict(found.connection_info)

    def _complete(self, attachment_id: str) -> None:
        self._client().attachments.complete(attachment_id)

    def _connection_info(self, attachment_id: str) -> dict[str, Any]:
        return dict(self._client().attachments.show(attachment_id).connection_info or {})

    def _delete_attachment(self, attachment_id: str) -> None:
        self._client().attachments.delete(attachment_id)

    def _roles(self) -> tuple[str, ...]:
        get_access = getattr(self._session.auth, "get_access", None)
        return tuple(get_access(self._session).role_names or ()) if get_access else ()

    def _host_name(self) -> str:
        where = {key: value for key, value in self._where.items() if key != "endpoint_override"}
        endpoint = self._where["endpoint_override"] or self._session.get_endpoint(**where)
        return urlsplit(endpoint or "").hostname or "localhost"


def _volume_of(found: Any) -> Volume:  # noqa: ANN401  cinderclient has no types
    return Volume(
        volume_id=str(found.id),
        status=str(found.status),
        size=int(found.size) * GIB,
        is_multiattach=bool(found.multiattach),
        is_encrypted=bool(found.encrypted),
        metadata={str(key): str(value) for key, value in (found.metadata or {}).items()},
        attached=tuple(
            Attachment(
                attachment_id=str(one["attachment_id"]),
                status="attached",
                server_id=one.get("server_id"),
                tag=one.get("device"),
            )
            for one in found.attachments
        ),
    )


def _kind_of(status: int) -> type[errors.VolumeError]:
    if status in BUSY_STATUSES:
        return errors.VolumeBusyError
    is_refusal = http.HTTPStatus.BAD_REQUEST <= status < http.HTTPStatus.INTERNAL_SERVER_ERROR
    # 408: something before Cinder waited for it in vain.
    return errors.VolumeRefusedError if is_refusal and status != http.HTTPStatus.REQUEST_TIMEOUT else errors.VolumeError


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Raise nothing of cinderclient, keystoneauth and HTTP out of the block: only our errors."""
    from cinderclient import exceptions as cinder

    try:
        yield
    except errors.VolumeError as exc:
        raise type(exc)(f"{what}: {exc}") from exc
    except cinder.NotFound as exc:
        raise errors.VolumeGoneError(f"{what}: Cinder does not know it, or does not show it to us") from exc
    except cinder.ClientException as exc:
        raise _kind_of(exc.code)(f"{what}: Cinder answered {exc.code} ({safe_text(str(exc.message or ''))})") from exc
    except (ksa.Unauthorized, ksa.Forbidden, ksa.AuthorizationFailure, ksa.AuthPluginException) as exc:
        raise errors.VolumeRefusedError(f"{what}: authentication failed: {safe_text(str(exc))}") from exc
    except ksa.CatalogException as exc:
        text = "the service catalog has no fitting block-storage endpoint (region_name, valid_interfaces)"
        raise errors.VolumeError(f"{what}: {text}: {safe_text(str(exc))}") from exc
    except (ksa.ClientException, requests.RequestException, urllib3.exceptions.HTTPError, OSError) as exc:
        raise errors.VolumeError(f"{what}: {type(exc).__name__}: {safe_text(str(exc))}") from exc
    except _NOT_CINDER as exc:
        # Its text may quote the answer.
        raise errors.VolumeError(f"{what}: the answer is not one of Cinder ({type(exc).__name__})") from None

"""What HTTP, keystoneauth and the sockets below may raise, in our words. No secret gets into a message."""

import http.client
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import requests
import urllib3
from keystoneauth1 import exceptions as ksa

from basefs import errors
from basefs.core.safe_text import safe_text

RETRY_AFTER_MAX_S = 3600.0
_TRANSPORT_ERRORS = (
    OSError,
    http.client.HTTPException,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    ksa.ClientException,
)
_TAG = re.compile(r"<(title|head).*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)
_DIGITS = re.compile(r"\s*[+-]?[0-9]+\s*")


def text_of_error(exc: BaseException) -> str:
    """Kind and text of what went wrong at the bottom: "Connection refused", not six libraries' words about it."""
    root = exc
    while isinstance(below := root.__cause__ or root.__context__, _TRANSPORT_ERRORS):
        root = below
    return f"{type(root).__name__}: {safe_text(str(root))}"


def text_of_body(body: bytes) -> str:
    """What an error page says, without markup; "" for an empty or unreadable one."""
    return safe_text(_TAG.sub(" ", body.decode("utf-8", "replace")))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for, 0 to one hour; None when there is no such header or it is garbage."""
    text = headers.get("Retry-After")
    if text is None:
        return None
    try:
        seconds = float(text) if _DIGITS.fullmatch(text) else _seconds_until(text)
    except (ValueError, TypeError, OverflowError, LookupError):  # what the parser raises depends on the garbage
        return None
    return min(max(seconds, 0.0), RETRY_AFTER_MAX_S)


def _seconds_until(text: str) -> float:
    when = parsedate_to_datetime(text)
    return (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()


def error_of_status(
    status: int, what: str, *, detail: str = "", retry_after: float | None = None, who: str = "Glance"
) -> errors.BasefsError:
    """The error that the answer `status` (not 2xx) of Glance, or `who` it was, to `what` means."""
    message = f"{what}: {who} answered {status}" + (f" ({detail})" if detail else "")
    if status == http.HTTPStatus.NOT_FOUND:
        return errors.ImageNotFoundError(message)
    if status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
        return errors.SourceForbiddenError(message)
    # 409, 429 and 5xx by name; what else may come (3xx, 405, 408, ...) is a proxy's or a wrong endpoint's
    # word and says nothing about the image either.
    is_server_error = status >= http.HTTPStatus.INTERNAL_SERVER_ERROR
    return errors.SourceUnavailableError(message, retry_after_s=retry_after, may_be_away=is_server_error)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise nothing of HTTP and keystoneauth out of the block: only our errors, `from` the original.

    Raises:
        SourceForbiddenError: Keystone refuses our credentials, or the auth plugin cannot work as configured.
        SourceUnavailableError: Everything else: no connection, DNS, TLS, time-out, a body cut short, discovery.
    """
    try:
        yield
    except (ksa.Unauthorized, ksa.Forbidden) as exc:
        raise errors.SourceForbiddenError(f"{what}: authentication failed: {safe_text(str(exc))}") from exc
    except (ksa.AuthPluginException, ksa.AuthorizationFailure, ksa.MissingAuthMethods) as exc:
        raise errors.SourceForbiddenError(f"{what}: authentication is not possible: {safe_text(str(exc))}") from exc
    except ksa.CatalogException as exc:
        text = f"{what}: the service catalog has no fitting image endpoint (region_name, valid_interfaces)"
        raise errors.SourceUnavailableError(f"{text}: {safe_text(str(exc))}") from exc
    except ksa.HttpError as exc:
        after = getattr(exc, "retry_after", None)
        seconds = float(after) if isinstance(after, int | float) and after > 0 else None
        text = f"{what}: {safe_text(str(exc))}"
        is_server_error = (exc.http_status or 0) >= http.HTTPStatus.INTERNAL_SERVER_ERROR
        raise errors.SourceUnavailableError(text, retry_after_s=seconds, may_be_away=is_server_error) from exc
    except (ksa.ClientException, requests.RequestException, urllib3.exceptions.HTTPError) as exc:
        raise errors.SourceUnavailableError(f"{what}: {text_of_error(exc)}", may_be_away=True) from exc
    except (http.client.HTTPException, OSError, UnicodeError, RecursionError) as exc:
        raise errors.SourceUnavailableError(f"{what}: {text_of_error(exc)}", may_be_away=True) from exc

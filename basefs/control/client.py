"""The commands' side of the control socket. Every failure is a ControlError that says what to do."""

import json
import os
import socket
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from basefs.control.api import API_PREFIX
from basefs.errors import ControlError

ANSWER_DEADLINE_S = 15.0
PROGRESS_DEADLINE_S = 60.0
"""Far above the interval of progress lines: without one for so long the server hangs."""
CONNECT_DEADLINE_S = 5.0


class ControlClient:
    """Commands to a running server; a context manager, for one thread."""

    def __init__(self, socket_path: Path, *, answer_deadline_s: float = ANSWER_DEADLINE_S) -> None:
        self._path = socket_path
        self._deadline_s = answer_deadline_s
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket_path)),
            base_url=f"http://basefs{API_PREFIX}",
            timeout=httpx.Timeout(answer_deadline_s, connect=CONNECT_DEADLINE_S),
        )

    def __enter__(self) -> Self:
        self._check_connection()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._http.close()

    def status(self) -> dict[str, Any]:
        """What `ServiceView.status` tells."""
        return self._object("GET", "/status")

    def images(self) -> list[dict[str, Any]]:
        """Every image of the catalog."""
        answer = self._call("GET", "/images")
        if not isinstance(answer, list):
            raise self._strange()
        return answer

    def image(self, ref: str) -> dict[str, Any]:
        """One image by id, base name or unique name."""
        return self._object("GET", _image_path(ref))

    def start_warm(self, ref: str) -> dict[str, Any]:
        """Have the server fetch the image, whatever becomes of this process."""
        return self._object("POST", _image_path(ref) + "/warm", wait="false")

    def warm(self, ref: str) -> Generator[dict[str, Any], None, None]:
        """Progress of fetching the image; closing the iterator gives up the wish for it."""
        timeout = httpx.Timeout(PROGRESS_DEADLINE_S, connect=CONNECT_DEADLINE_S)
        path = _image_path(ref) + "/warm"
        try:
            with self._http.stream("POST", path, params={"wait": "true"}, timeout=timeout) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    self._raise_for(response)
                for line in response.iter_lines():
                    yield json.loads(line)
        except httpx.HTTPError as exc:
            raise self._unreachable(exc) from None
        except ValueError:
            raise self._strange() from None

    def evict(self, ref: str) -> dict[str, Any]:
        """Drop the image's local bytes."""
        return self._object("POST", _image_path(ref) + "/evict")

    def _object(self, method: str, path: str, **params: str) -> dict[str, Any]:
        answer = self._call(method, path, **params)
        if not isinstance(answer, dict):
            raise self._strange()
        return answer

    def _call(self, method: str, path: str, **params: str) -> object:
        try:
            response = self._http.request(method, path, params=params)
        except httpx.HTTPError as exc:
            raise self._unreachable(exc) from None
        self._raise_for(response)
        try:
            answer: object = response.json()
        except ValueError:
            raise self._strange() from None
        return answer

    def _raise_for(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        try:
            raise ControlError(str(response.json()["error"]))
        except (ValueError, KeyError, TypeError):
            raise ControlError(f"the server failed (HTTP {response.status_code}); its log has the traceback") from None

    def _unreachable(self, exc: httpx.HTTPError) -> ControlError:
        if isinstance(exc, httpx.ConnectTimeout | httpx.ReadTimeout | httpx.WriteTimeout):
            return self._hangs()
        return ControlError(f"basefs ended the connection on {self._path}: its server died or was stopped; see its log")

    def _check_connection(self) -> None:
        """Find out why nobody can be reached; httpx would say only that, and leave its socket to the collector."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(CONNECT_DEADLINE_S)
            try:
                probe.connect(os.fspath(self._path))
            except (FileNotFoundError, NotADirectoryError):
                raise ControlError(
                    f"basefs is not running: no control socket at {self._path}; start it with "
                    "`basefs mount --background`"
                ) from None
            except PermissionError:
                raise ControlError(
                    f"permission denied on the control socket {self._path}: run the command as its owner, root"
                ) from None
            except TimeoutError:
                raise self._hangs() from None
            except OSError as exc:
                raise ControlError(
                    f"nobody answers on the control socket {self._path} ({exc.strerror}): the server died or is being "
                    "started again; see `basefs doctor`"
                ) from None

    def _hangs(self) -> ControlError:
        return ControlError(
            f"basefs does not answer on {self._path} within {self._deadline_s:g} s: its server hangs; see its log"
        )

    def _strange(self) -> ControlError:
        return ControlError(f"the answer on {self._path} is not basefs's: is control_socket another program's?")


def _image_path(ref: str) -> str:
    return "/images/" + quote(ref, safe="")

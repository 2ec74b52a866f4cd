"""The commands' side of the control socket. Every failure is a ControlError that says what to do.

`http.client` and not httpx, which takes 0.5 s to import: as long as everything else a short command does.
"""

import http.client
import json
import os
import socket
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from basefs.control.api import API_PREFIX
from basefs.errors import ControlError

ANSWER_DEADLINE_S = 15.0
PROGRESS_DEADLINE_S = 60.0
"""Far above the interval of progress lines: without one for so long the server hangs."""
ANSWER_BYTES_MAX = 256 * 1024 * 1024


class ControlClient:
    """Commands to a running server, each over a connection of its own."""

    def __init__(self, socket_path: Path, *, answer_deadline_s: float = ANSWER_DEADLINE_S) -> None:
        self._path = socket_path
        self._deadline_s = answer_deadline_s

    def status(self) -> dict[str, Any]:
        """What `ServiceView.status` tells."""
        return self._object("GET", "/status")

    def images(self) -> list[dict[str, Any]]:
        """Every image of the catalog."""
        answer = self._call("GET", "/images", deadline_s=self._deadline_s)
        if not isinstance(answer, list):
            self._raise_strange()
        return answer

    def image(self, ref: str) -> dict[str, Any]:
        """One image by id, base name or unique name."""
        return self._object("GET", _image_path(ref))

    def image_map(self, ref: str, *, cells_max: int) -> dict[str, Any]:
        """What `ServiceView.image_map` tells."""
        return self._object("GET", f"/maps/{_quoted(ref)}?cells={cells_max}")

    def start_warm(self, ref: str) -> dict[str, Any]:
        """Have the server fetch the image, whatever becomes of this process."""
        return self._object("POST", _image_path(ref) + "/warm?wait=false")

    def warm(self, ref: str) -> Generator[dict[str, Any], None, None]:
        """Progress of fetching the image; closing the generator gives up the wish for it."""
        return self._progress(_image_path(ref) + "/warm?wait=true")

    def warm_boot(self, ref: str) -> Generator[dict[str, Any], None, None]:
        """Progress of fetching what the image's boot trace says."""
        return self._progress(_image_path(ref) + "/warm?what=boot")

    def traces(self) -> list[dict[str, Any]]:
        """Every image that has a boot trace."""
        answer = self._call("GET", "/traces", deadline_s=self._deadline_s)
        if not isinstance(answer, list):
            self._raise_strange()
        return answer

    def trace(self, ref: str) -> dict[str, Any]:
        """One image's boot trace."""
        return self._object("GET", f"/traces/{_quoted(ref)}")

    def put_trace(self, ref: str, data: bytes) -> dict[str, Any]:
        """Give the image the boot trace in the file `data`."""
        return self._object("PUT", f"/traces/{_quoted(ref)}", data)

    def verify(self, ref: str | None) -> Generator[dict[str, Any], None, None]:
        """Progress of checking what is here of the image, or of all images (None)."""
        return self._progress("/verify" if ref is None else _image_path(ref) + "/verify")

    def drain(self) -> Generator[dict[str, Any], None, None]:
        """Progress of making every image in use a file of the lower directory."""
        return self._progress("/drain")

    def _progress(self, path: str) -> Generator[dict[str, Any], None, None]:
        try:
            with closing(_UnixConnection(self._path, PROGRESS_DEADLINE_S)) as connection:
                connection.request("POST", API_PREFIX + path)
                with connection.getresponse() as response:
                    self._raise_for(response)
                    while line := response.readline():
                        yield json.loads(line)
        except (OSError, http.client.HTTPException) as exc:
            self._raise_unreachable(exc, PROGRESS_DEADLINE_S)
        except ValueError:
            self._raise_strange()

    def evict(self, ref: str) -> dict[str, Any]:
        """Drop the image's local bytes."""
        return self._object("POST", _image_path(ref) + "/evict")

    def detach(self, ref: str, *, force: bool) -> dict[str, Any]:
        """Detach the image's volume; `force`: also while the image is in use."""
        path = f"{_image_path(ref)}/detach?force={'true' if force else 'false'}"
        return self._object("POST", path, deadline_s=PROGRESS_DEADLINE_S)

    def pin(self, ref: str, *, pinned: bool) -> dict[str, Any]:
        """Keep what is here of the image, or no longer."""
        return self._object("POST", _image_path(ref) + ("/pin" if pinned else "/unpin"))

    def _object(
        self, method: str, path: str, body: bytes | None = None, *, deadline_s: float | None = None
    ) -> dict[str, Any]:
        answer = self._call(method, path, body, deadline_s=self._deadline_s if deadline_s is None else deadline_s)
        if not isinstance(answer, dict):
            self._raise_strange()
        return answer

    def _call(self, method: str, path: str, body: bytes | None = None, *, deadline_s: float) -> object:
        try:
            with closing(_UnixConnection(self._path, deadline_s)) as connection:
                connection.request(method, API_PREFIX + path, body)
                with connection.getresponse() as response:
                    self._raise_for(response)
                    answer: object = json.loads(response.read(ANSWER_BYTES_MAX))
                    return answer
        except (OSError, http.client.HTTPException) as exc:
            self._raise_unreachable(exc, deadline_s)
        except ValueError:
            self._raise_strange()

    def _raise_for(self, response: http.client.HTTPResponse) -> None:
        """Return for a success; else raise what the server said."""
        if response.status < http.client.MULTIPLE_CHOICES:
            return
        try:
            text = str(json.loads(response.read(ANSWER_BYTES_MAX))["error"])
        except (ValueError, KeyError, TypeError):
            text = f"the server failed (HTTP {response.status}); its log has the traceback"
        raise ControlError(text)

    def _raise_unreachable(self, exc: Exception, deadline_s: float) -> NoReturn:
        path = self._path
        if isinstance(exc, FileNotFoundError | NotADirectoryError):
            text = f"basefs is not running: no control socket at {path}; start it with `basefs mount --background`"
        elif isinstance(exc, PermissionError):
            text = f"permission denied on the control socket {path}: run the command as its owner, root"
        elif isinstance(exc, TimeoutError | BlockingIOError):
            text = f"basefs does not answer on {path} within {deadline_s:g} s: its server hangs; see its log"
        elif isinstance(exc, ConnectionRefusedError):
            text = (
                f"nobody answers on the control socket {path}: the server died or is being started again; see "
                "`basefs doctor`"
            )
        elif isinstance(exc, http.client.BadStatusLine) and not isinstance(exc, ConnectionError):
            self._raise_strange()
        else:
            text = f"basefs ended the connection on {path}: its server died or was stopped; see its log"
        raise ControlError(text) from None

    def _raise_strange(self) -> NoReturn:
        raise ControlError(
            f"the answer on {self._path} is not basefs's: is control_socket another program's?"
        ) from None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("basefs", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


def _quoted(ref: str) -> str:
    """What a command was given, also what is no text in the locale's encoding: that fits no image."""
    return quote(ref, safe="", errors="surrogateescape")


def _image_path(ref: str) -> str:
    return "/images/" + _quoted(ref)

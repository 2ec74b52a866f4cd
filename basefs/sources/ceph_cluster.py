"""A connection to a Ceph cluster: librados and librbd in this process, their completions in the loop.

In this process, for a read by way of another one costs a copy and two context switches more than librbd itself. What
may block (connecting, opening, closing) is in threads, with a deadline, and is left behind in them when the cluster
does not answer; librados' own time-outs end it there. The server's end waits for none of them (`os._exit`).
"""

import importlib.machinery
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

import trio

from basefs import errors
from basefs.concurrency.threads import BlockingCalls
from basefs.config.store_options import RbdSettings
from basefs.core.safe_text import safe_text

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

BLOCKING_THREADS_MAX = 4
DEBIAN_PACKAGES = "/usr/lib/python3/dist-packages"
"""python3-rados and python3-rbd are built for Debian's interpreter, and fit any CPython of its version."""
MISSING_LIBRARY = (
    "no librbd for this Python: install Debian's python3-rbd, and run basefs on Debian's version of Python"
)
_EPERM, _ENOENT, _EIO, _EACCES, _ESHUTDOWN, _ETIMEDOUT = 1, 2, 5, 13, 108, 110


@dataclass(frozen=True, slots=True, kw_only=True)
class CephLibrary:
    """Python's modules of librados and librbd."""

    rados: Any
    rbd: Any


def load_library() -> CephLibrary | None:
    """The modules, from this Python's path or from Debian's packages; None where they are not, or do not fit it."""
    try:
        return CephLibrary(rados=_module("rados"), rbd=_module("rbd"))
    except ImportError:
        return None


def _module(name: str) -> Any:  # noqa: ANN401  has no types
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        # These two only: all else of Debian's Python stays out of a venv.
        spec = importlib.machinery.PathFinder.find_spec(name, [DEBIAN_PACKAGES])
        if spec is None or spec.loader is None:
            raise ImportError(name)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(name)


class ConnectionLostError(errors.StoreGoneError):
    """We were blocklisted: what is open must be opened anew, over another connection."""

    may_be_reopened = True


def error_of_code(code: int, what: str) -> errors.SourceError:
    """The error that librbd's or librados' errno `code` (> 0) means."""
    if code == _ENOENT:
        return errors.StoreGoneError(f"{what}: it is not there")
    if code in (_EPERM, _EACCES):
        return errors.SourceForbiddenError(f"{what}: Ceph refuses us: the user needs the caps profile rbd-read-only")
    if code == _ESHUTDOWN:
        return ConnectionLostError(f"{what}: the cluster does not take requests of this client any more")
    text = "no answer in time" if code == _ETIMEDOUT else f"error {code}"
    return errors.SourceUnavailableError(f"{what}: {text}", may_be_away=code != _EIO)


class Cluster:
    """A connected cluster. `fsid` in lower case."""

    def __init__(self, library: CephLibrary, rados: Any) -> None:  # noqa: ANN401  has no types
        self.library = library
        self.fsid = str(rados.get_fsid()).lower()
        self.is_usable = True
        """False once it refused us for good: a new connection is made then."""
        self._rados = rados
        self._pools: dict[str, Any] = {}
        self._lock = threading.Lock()

    def pool(self, name: str) -> Any:  # noqa: ANN401  has no types
        """The pool's I/O context (thread)."""
        with self._lock:
            if name not in self._pools:
                self._pools[name] = self._rados.open_ioctx(name)
            return self._pools[name]

    def close(self) -> None:
        """Disconnect (thread). What is open there was closed before."""
        with self._lock:
            for pool in self._pools.values():
                pool.close()
            self._pools.clear()
        self._rados.shutdown()


def connected(library: CephLibrary, settings: RbdSettings) -> Cluster:
    """A new connection (thread). Raises the library's errors; see `translated`."""
    # Nothing is cached or read ahead by librbd: basefs does both, and knows better what for.
    options = {
        "rbd_cache": "false",
        "client_mount_timeout": str(settings.connect_timeout_s),
        "rados_mon_op_timeout": str(settings.connect_timeout_s),
        "rados_osd_op_timeout": str(settings.op_timeout_s),
    }
    rados = library.rados.Rados(conffile=settings.ceph_conf, rados_id=settings.user, conf=options)
    try:
        rados.connect(timeout=settings.connect_timeout_s)
        return Cluster(library, rados)
    except BaseException:
        rados.shutdown()
        raise


class _Handover:
    """What a call that was left behind returns is given back by its own thread.

    (Left behind in the microseconds after it returned, it is closed by its destructor: the cluster answers then.)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_abandoned = False

    def run(self, give_back: Callable[[T], None], fn: Callable[[*Ts], T], *args: *Ts) -> T:
        made = fn(*args)
        with self._lock:
            if not self._is_abandoned:
                return made
        give_back(made)
        return made

    def abandon(self) -> None:
        with self._lock:
            self._is_abandoned = True


class CephCalls:
    """The door to those calls of the libraries that may block."""

    def __init__(self, library: CephLibrary) -> None:
        self._library = library
        self.errors: tuple[type[Exception], ...] = (library.rados.Error, library.rbd.Error)
        """What calls of the libraries raise."""
        self._threads = BlockingCalls("ceph", threads_max=BLOCKING_THREADS_MAX)

    async def make(
        self, limit_s: float, what: str, give_back: Callable[[T], None], fn: Callable[[*Ts], T], *args: *Ts
    ) -> T:
        """What `fn(*args)` made in a thread; made too late, it is given back there.

        Raises:
            StoreGoneError, SourceForbiddenError, SourceUnavailableError: as the library's error means.
        Cancellation: at any time.
        """
        handover = _Handover()
        try:
            return await self._threads.run_within(limit_s, handover.run, give_back, fn, *args)
        except trio.TooSlowError:
            raise errors.SourceUnavailableError(f"{what}: no answer within {limit_s:g} s", may_be_away=True) from None
        except self.errors as exc:
            raise self.translated(exc, what) from exc
        finally:
            handover.abandon()

    async def give_back(self, limit_s: float, fn: Callable[[], None]) -> None:
        """Call `fn` in a thread, and leave it behind there when it takes longer. Cancellation: never; bounded."""
        with trio.CancelScope(shield=True):
            try:
                await self._threads.run_within(limit_s, fn)
            except trio.TooSlowError:
                log.debug("ceph: something could not be closed within %g s", limit_s)
            except self.errors as exc:
                log.debug("ceph: %s", safe_text(str(exc)))

    def translated(self, exc: BaseException, what: str) -> BaseException:
        """The error of ours that one of `errors` means; any other is a bug, and itself."""
        if not isinstance(exc, self.errors):
            return exc
        code = getattr(exc, "errno", None)
        if isinstance(exc, self._library.rados.ObjectNotFound) and not isinstance(code, int):
            code = _ENOENT
        if not isinstance(code, int):
            return errors.SourceUnavailableError(f"{what}: {safe_text(str(exc))}", may_be_away=True)
        return error_of_code(abs(code), what)

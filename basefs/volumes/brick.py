"""os-brick, as the server uses it: in helper processes that have a deadline and are killed when they exceed it.

A helper answers one request at a time. Its start takes 0.8 s (os-brick's import; measured), so it is started before it
is needed, and one that has answered well is kept for some seconds for the next volume: at the unmount of a host with
50 linked images that is what counts.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from oslo_utils import strutils

from basefs import errors
from basefs.volumes.base import VolumeBytes
from basefs.volumes.bytes import FdVolumeBytes
from basefs.volumes.connection import read_connection, sealed_connection
from basefs.volumes.served import STREAMS, ServedVolumeBytes

log = logging.getLogger(__name__)

HELPER_IDLE_S = 5.0
"""A helper (60 MiB) without work is kept so long."""
PROPERTIES_LIMIT_S = 30.0
"""Start included; half a minute, for a host that is booting."""
DISCONNECT_LIMIT_S = 60.0
"""os-brick waits for devices to vanish."""
KILL_WAIT_S = 5.0
"""A killed process whose device hangs in the kernel may stay for ever: it is left behind."""
ANSWER_BYTES_MAX = 64 * 1024
LOG_LINES_MAX = 500
LOG_LINE_BYTES_MAX = 2000
HELPER_COMMAND = (sys.executable, "-P", "-m", "basefs.volumes.helper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What os-brick connected, opened read-only; it and the fd are the caller's. `path`: None, where there is none."""

    path: str | None
    bytes: VolumeBytes
    connection_fd: int


class Helper:
    """One helper process. Owned by whoever has it from `Brick.helper`; an error of a method means that it is ended."""

    def __init__(self, process: trio.Process, server_end: socket.socket, *, is_multipath: bool) -> None:
        self.process = process
        self._socket = server_end
        self._is_multipath = is_multipath
        self.idle = trio.CancelScope()
        """Around its time without work."""
        self.is_serving = False
        """It has a volume open for good, and ends when that is let go."""

    async def properties(self, *, host: str, towards: str) -> dict[str, Any]:
        """What Cinder has to know of this host. `towards`: a host name; our address on the way there is told.

        Raises:
            VolumeError: os-brick failed, or did not answer in time.
        """
        answer, _fds = await self._ask({"do": "properties", "host": host, "towards": towards}, None, PROPERTIES_LIMIT_S)
        return dict(answer["properties"])

    async def connect(self, connection_fd: int, limit_s: float) -> Device:
        """Connect the volume to this host and open it. What is connected when it fails must be disconnected.

        Raises:
            NoVolumeError: it was connected, and is of a kind that cannot be linked; it is disconnected.
            VolumeError: os-brick failed, or did not answer in time.
        """
        answer, fds = await self._ask({"do": "connect"}, connection_fd, limit_s)
        opened = self._bytes_of(answer, fds)
        try:
            connection_info, _none = read_connection(connection_fd)
            sealed = sealed_connection(connection_info, answer["device_info"])
        except BaseException:
            opened.close()
            raise
        return Device(path=answer["device"], bytes=opened, connection_fd=sealed)

    def _bytes_of(self, answer: Mapping[str, Any], fds: list[int]) -> VolumeBytes:
        if len(fds) == STREAMS:
            self.is_serving = True
            return ServedVolumeBytes([socket.socket(fileno=fd) for fd in fds], answer["size"], self.let_go)
        if len(fds) != 1:
            raise errors.VolumeError("os-brick's helper sent no device")
        try:
            return FdVolumeBytes(fds[0])
        except BaseException:
            os.close(fds[0])
            raise

    async def disconnect(self, connection_fd: int, *, may_be_shared: bool) -> list[str]:
        """Disconnect the volume from this host; who else uses its device, for whose sake it was left connected.

        Args:
            connection_fd: Of `sealed_connection`; it stays the caller's.
            may_be_shared: The volume has attachments that are not ours. Else a user of the device is an error.

        Raises:
            VolumeError: os-brick failed, or did not answer in time.
        """
        request = {"do": "disconnect", "may_be_shared": may_be_shared}
        answer, _fds = await self._ask(request, connection_fd, DISCONNECT_LIMIT_S)
        return list(answer.get("users", []))

    async def _ask(
        self, request: Mapping[str, Any], connection_fd: int | None, limit_s: float
    ) -> tuple[dict[str, Any], list[int]]:
        what = f"os-brick, {request['do']}"
        rights = [] if connection_fd is None else [connection_fd]
        data = json.dumps({**request, "multipath": self._is_multipath}).encode()
        try:
            # Small, and nothing else is in the socket: it takes it at once.
            socket.send_fds(self._socket, [data], rights)
            with trio.fail_after(limit_s):
                await trio.lowlevel.wait_readable(self._socket)
            reply, fds, _flags, _address = socket.recv_fds(self._socket, ANSWER_BYTES_MAX, STREAMS)
            for fd in fds:
                os.set_inheritable(fd, False)  # the flag of recv_fds that does it is not heeded by Python 3.11
        except trio.TooSlowError:
            raise errors.VolumeError(f"{what}: no answer within {limit_s:g} s") from None
        except OSError as exc:
            raise errors.VolumeError(f"{what}: the helper process ended ({exc.strerror})") from exc
        try:
            return _understood(reply, what), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def let_go(self) -> None:
        """Have it end by itself, soon. Also for threads."""
        self._socket.close()

    async def end(self) -> None:
        """Kill it, with the commands that it started. Cancellation: never; bounded."""
        self._socket.close()
        with trio.move_on_after(KILL_WAIT_S, shield=True):
            if self.process.returncode is None:
                with suppress(ProcessLookupError):  # it does so itself when the socket ends
                    os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()


def _understood(reply: bytes, what: str) -> dict[str, Any]:
    if not reply:
        raise errors.VolumeError(f"{what}: the helper process ended")
    try:
        answer: dict[str, Any] = json.loads(reply)
    except ValueError:
        raise errors.VolumeError(f"{what}: the helper's answer cannot be understood") from None
    if "refused" in answer:
        raise errors.NoVolumeError(f"{answer['refused']}")
    if "error" in answer:
        raise errors.VolumeError(f"{what}: {answer['error']}")
    return answer


class Brick:
    """Helper processes, `helpers_max` at work at a time; further ones wait."""

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        helpers_max: int,
        lock_path: Path,
        is_multipath: bool,
        command: Sequence[str] = HELPER_COMMAND,
    ) -> None:
        """`lock_path`: directory of os-brick's locks, made if it is not there; nova's, where nova attaches volumes."""
        self._nursery = nursery
        self._slots = trio.Semaphore(helpers_max)
        self._lock_path = lock_path
        self._is_multipath = is_multipath
        self._command = command
        self._idle: list[Helper] = []

    @asynccontextmanager
    async def helper(self) -> AsyncIterator[Helper]:
        """A helper for the block; after an error or cancellation in it the process is killed.

        Raises:
            VolumeError: it cannot be started.
        """
        async with self._slots:
            helper = self._take_idle() or await self._start()
            try:
                yield helper
            except BaseException:
                await helper.end()
                raise
            if helper.is_serving:
                self._nursery.start_soon(_outlast, helper)
                return
            helper.idle = trio.CancelScope()
            self._idle.append(helper)
            self._nursery.start_soon(self._keep, helper, helper.idle)

    def _take_idle(self) -> Helper | None:
        while self._idle:
            helper = self._idle.pop()
            if helper.process.poll() is None:
                helper.idle.cancel()
                return helper
        return None

    async def _keep(self, helper: Helper, idle: trio.CancelScope) -> None:
        """Ends the helper after some time without work. Ends when that is done, or the helper is used again."""
        try:
            with idle:
                await trio.sleep(HELPER_IDLE_S)
        finally:
            if not idle.cancelled_caught:
                # No await lies between the end of its time and this; it is not there if it had died.
                if helper in self._idle:
                    self._idle.remove(helper)
                await helper.end()

    async def _start(self) -> Helper:
        server_end, helper_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server_end.setblocking(False)
        try:
            process = await trio.lowlevel.open_process(
                [*self._command, str(helper_end.fileno()), os.fspath(self._lock_path)],
                pass_fds=[helper_end.fileno()],  # and nothing else: not the mount, not the lower directory
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as exc:
            server_end.close()
            raise errors.VolumeError(f"os-brick's helper process cannot be started: {exc.strerror}") from exc
        except BaseException:
            server_end.close()
            raise
        finally:
            helper_end.close()
        assert process.stderr is not None
        self._nursery.start_soon(_log_lines, process.stderr, process.pid)
        return Helper(process, server_end, is_multipath=self._is_multipath)


async def _outlast(helper: Helper) -> None:
    """Ends when the helper does; it goes with the service."""
    try:
        await helper.process.wait()
    finally:
        await helper.end()


async def _log_lines(stream: trio.abc.ReceiveStream, pid: int) -> None:
    """Ends with the helper; masked, and bounded: os-brick may log what it was given."""
    lines = 0
    rest = b""
    async with stream:
        with suppress(trio.BrokenResourceError):
            async for piece in stream:
                *whole, rest = (rest + piece).split(b"\n")
                rest = rest[-LOG_LINE_BYTES_MAX:]
                for line in whole[: max(0, LOG_LINES_MAX - lines)]:
                    text = strutils.mask_password(line[:LOG_LINE_BYTES_MAX].decode("utf-8", "replace"))
                    log.debug("os-brick, process %d: %s", pid, text)
                lines += len(whole)

"""The FUSE session: libfuse learns its state from a FUSE_INIT that the keeper plays, then speaks to the kernel.

libfuse takes an already open fd for a mount point of the form `/dev/fd/N`. First that fd is the session socket,
over which the keeper sends the kernel's FUSE_INIT; then the `/dev/fuse` fd takes its number (dup2).
"""

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial

import pyfuse3
import trio

from basefs.fuse import session_waits
from basefs.fuse.operations import Operations
from basefs.fuse.request_loop import RequestLoop
from basefs.service.keeper_channel import KeeperChannel
from basefs.service.readers import Readers

SYNCHRONOUS_MAX = 1000
"""Requests worked on at a time beside `max_background` asynchronous ones, so that `stat` and `ls` never wait for reads
that wait for Glance (those of O_DIRECT count as asynchronous, however they are made). A request costs 8 KiB."""
IDLE_TASKS_MAX = 32
"""Workers that stay when they have nothing to do; the memory they read requests into comes to 32 MiB at most. With one,
as pyfuse3 has it, nearly each request that waits begins and ends a task and has its memory anew: five page faults."""


log = logging.getLogger(__name__)


class _RepliesToNobody(logging.Filter):
    """Drops pyfuse3's records of replies to requests that the kernel has withdrawn, as it does while unmounting."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().endswith(f"failed with {os.strerror(errno.ENOENT)}")


async def serve_session(
    operations: Operations,
    session_fd: int,
    channel: KeeperChannel,
    max_background: int,
    *,
    readers: Readers | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the kernel until the mount is gone or the keeper says `stop`. Reports started when requests are answered.

    The kernel has at most `max_background` asynchronous requests open at a time. `readers` are on the same connection;
    without them pyfuse3 takes the requests.

    Raises:
        MountError: the keeper ended during the handshake.
    """
    logging.getLogger("pyfuse3").addFilter(_RepliesToNobody())
    session_waits.install()
    pyfuse3.init(operations, f"/dev/fd/{session_fd}", set())
    try:
        channel.send({"type": "prepared"})
        (fuse_fd,) = await channel.expect("serve")
        with trio.CancelScope() as handshake:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main)  # answers the FUSE_INIT that comes over the socket
                await channel.expect("switch")
                handshake.cancel()
        # Nobody waits on the socket now, so epoll forgets it cleanly.
        os.dup2(fuse_fd, session_fd)
        os.close(fuse_fd)
        os.set_blocking(session_fd, readers is None)
        async with trio.open_nursery() as nursery:
            serve = _requests_of(operations, session_fd, max_background + SYNCHRONOUS_MAX, readers)
            nursery.start_soon(_serve_then_cancel, serve, nursery.cancel_scope)
            nursery.start_soon(_cancel_at_stop, channel, nursery.cancel_scope)
            if readers is not None:
                channel.on_reader = readers.connect
                nursery.start_soon(readers.run)
            channel.send({"type": "ready"})
            task_status.started()
    finally:
        pyfuse3.close(unmount=False)


def _requests_of(
    operations: Operations, session_fd: int, tasks_max: int, readers: Readers | None
) -> Callable[[], Awaitable[None]]:
    """What answers the kernel's requests until the session is over."""
    if readers is None:
        return partial(pyfuse3.main, min_tasks=IDLE_TASKS_MAX, max_tasks=tasks_max)
    return RequestLoop(operations, session_fd, readers.room, is_alone=lambda: readers.is_none).run


async def _serve_then_cancel(serve: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    """Ends when the session does."""
    await serve()
    scope.cancel()


async def _cancel_at_stop(channel: KeeperChannel, scope: trio.CancelScope) -> None:
    """Ends when the keeper says `stop` or is gone; the latter is no reason to stop.

    A request that waits is left unanswered: the keeper has the kernel hand it to the next server. One that changes
    something below runs in a thread by then, which is waited for and answered (`LowerCalls.run`), so nothing is
    done twice.
    """
    if await channel.listen():
        log.info("stopping: another server takes over")
        scope.cancel()

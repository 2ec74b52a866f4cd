"""The FUSE session: libfuse learns its state from a FUSE_INIT that the keeper plays, then speaks to the kernel.

libfuse takes an already open fd for a mount point of the form `/dev/fd/N`. First that fd is the session socket,
over which the keeper sends the kernel's FUSE_INIT; then the `/dev/fuse` fd takes its number (dup2).
"""

import errno
import logging
import os

import pyfuse3
import trio

from basefs.fuse import session_waits
from basefs.service.keeper_channel import KeeperChannel

SYNCHRONOUS_MAX = 1000
"""Requests worked on at a time beside `max_background` asynchronous ones, so that `stat` and `ls` never wait for reads
that wait for Glance (those of O_DIRECT count as asynchronous, however they are made). A request costs 8 KiB."""


log = logging.getLogger(__name__)


class _RepliesToNobody(logging.Filter):
    """Drops pyfuse3's records of replies to requests that the kernel has withdrawn, as it does while unmounting."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().endswith(f"failed with {os.strerror(errno.ENOENT)}")


async def serve_session(
    operations: pyfuse3.Operations,
    session_fd: int,
    channel: KeeperChannel,
    max_background: int,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the kernel until the mount is gone or the keeper says `stop`. Reports started when requests are answered.

    The kernel has at most `max_background` asynchronous requests open at a time.

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
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_main_then_cancel, max_background + SYNCHRONOUS_MAX, nursery.cancel_scope)
            nursery.start_soon(_cancel_at_stop, channel, nursery.cancel_scope)
            channel.send({"type": "ready"})
            task_status.started()
    finally:
        pyfuse3.close(unmount=False)


async def _main_then_cancel(tasks_max: int, scope: trio.CancelScope) -> None:
    """Ends when the session does."""
    await pyfuse3.main(max_tasks=tasks_max)
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

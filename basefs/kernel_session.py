"""The kernel's side of one mount: the `/dev/fuse` fd, FUSE_INIT, resending, the end. Standard library only."""

import errno
import logging
import os
import select
from typing import Self

from basefs import mounts, processes
from basefs.errors import BasefsError, MountError

log = logging.getLogger("basefs.keeper")

INIT_BYTES_MAX = 1024 * 1024


class SessionEndedError(BasefsError):
    """The FUSE session is over, so there is nothing left to serve."""


class KernelSession:
    """One FUSE connection and its mount. `fd` stays open until the session has ended.

    `entry` is the mount's line of mountinfo, `init_request` what the kernel sent first; both are there after `mount`.
    """

    entry: mounts.Mount
    init_request: bytes

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = mountpoint
        self._resend_works = True
        self.fd = -1
        self.is_answered = False
        """Whether the kernel has had its answer to FUSE_INIT."""

    @classmethod
    def of_another_keeper(cls, mountpoint: str, fd: int, entry: mounts.Mount, init_request: bytes) -> Self:
        """The session that an earlier keeper began and whose FUSE_INIT it has answered."""
        session = cls(mountpoint)
        session.fd, session.entry, session.init_request = fd, entry, init_request
        session.is_answered = True
        return session

    def mount(self) -> None:
        """Mount, and take the kernel's FUSE_INIT: it is sent once, and every later server is played the same bytes.

        Raises:
            MountError: Why not. `abandon` takes back what was done.
        """
        try:
            self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise MountError(f"cannot open /dev/fuse: {exc.strerror} (is the module fuse loaded?)") from None
        try:
            mounts.mount_fuse(self.fd, self.mountpoint)
        except OSError as exc:
            raise MountError(f"cannot mount on {self.mountpoint}: {exc.strerror}") from None
        ours = [mount for mount in mounts.mount_table() if mount.is_basefs and mount.mountpoint == self.mountpoint]
        self.entry = ours[-1]
        if len(ours) > 1:
            raise MountError(f"another basefs was mounted on {self.mountpoint} at the same moment")
        self.init_request = os.read(self.fd, INIT_BYTES_MAX)

    def answer_init(self, answer: bytes) -> None:
        """Give the kernel the first server's answer to FUSE_INIT.

        Raises:
            MountError: The kernel does not take it, mostly because somebody unmounted meanwhile.
        """
        try:
            os.write(self.fd, mounts.tuned_init_answer(answer))
            self.is_answered = True
        except OSError as exc:
            raise MountError(f"the kernel does not take the answer to FUSE_INIT: {exc.strerror}") from None

    def resend(self) -> None:
        """Have the kernel hand out again what a dead server had taken. The next one must have read nothing yet."""
        try:
            os.write(self.fd, mounts.FUSE_NOTIFY_RESEND)
        except OSError as exc:
            if exc.errno == errno.EINVAL and self._resend_works:
                log.warning(
                    "this kernel cannot resend requests (Linux 6.9 can): what a dead server had taken and not "
                    "answered stays unanswered until its caller is killed"
                )
                self._resend_works = False
            elif exc.errno != errno.EINVAL and not self.has_ended():
                raise

    @property
    def can_resend(self) -> bool:
        """Whether the kernel says that it can, in FUSE_INIT (Linux >= 6.9)."""
        return mounts.has_resend(self.init_request)

    def has_ended(self) -> bool:
        """Whether the session is over: unmounted everywhere and every file closed, or aborted."""
        poller = select.poll()
        poller.register(self.fd, 0)
        # Asked when there is reason to, never polled on: the kernel would wake us at every request.
        return any(event & select.POLLERR for _, event in poller.poll(0))

    def check(self) -> None:
        """Raise SessionEndedError once the session is over."""
        if self.has_ended():
            raise SessionEndedError

    def is_mounted(self) -> bool:
        """Whether the mount is still attached somewhere in our mount namespace."""
        mount = mounts.mount_by_id(self.entry.mount_id)
        # The kernel gives both numbers of a mount that is gone to the next one made, and soon.
        return mount is not None and (mount.minor, mount.mountpoint) == (self.entry.minor, self.entry.mountpoint)

    def unmount(self) -> None:
        """Take the mount away unless it is in use.

        Raises:
            MountError: It stays; the message names who uses it.
        """
        top = mounts.mount_at(self.mountpoint)
        if top is None or top.mount_id != self.entry.mount_id:
            raise MountError(f"the topmost mount on {self.mountpoint} is not ours")
        try:
            mounts.unmount(self.mountpoint)
        except OSError as exc:
            users = processes.describe_users(processes.users_of(top))
            raise MountError(f"cannot unmount {self.mountpoint}: {exc.strerror}: {users}") from None

    def abandon(self) -> None:
        """Remove the mount, whoever uses it, and let the kernel fail what waits for it."""
        top = mounts.mount_at(self.mountpoint)
        if top is not None and hasattr(self, "entry") and top.mount_id == self.entry.mount_id:
            mounts.unmount(self.mountpoint, is_lazy=True)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

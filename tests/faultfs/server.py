"""The process behind `FaultFs`: `python -m tests.faultfs.server BACKING PATH CONTROL_FD LOG`."""

import contextlib
import errno
import fnmatch
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pyfuse3
import trio

from basefs.concurrency.threads import BlockingCalls
from basefs.fuse.lower import LowerTree
from tests.fakes.escrow import MemoryEscrow
from tests.faultfs.log import LogWriter, Record
from tests.mount.lower_server import LowerOnly

TASKS_MAX = 2000
DROP_LIMIT_S = 1.0
"""A page that is being read or written by a hung request cannot be dropped; it is not waited for."""


@dataclass(slots=True, eq=False)
class Rule:
    kind: str
    ops: list[str]
    names: str
    times: int | None
    after: int
    error: str
    struck: int = 0
    skipped: int = 0
    lifted: trio.Event = field(default_factory=trio.Event)

    def matches(self, op: str, name: str) -> bool:
        """Whether it strikes this request; counts it."""
        if op not in self.ops or not fnmatch.fnmatch(name, self.names):
            return False
        if self.skipped < self.after:
            self.skipped += 1
            return False
        if self.times is not None and self.struck >= self.times:
            return False
        self.struck += 1
        return True


class Faults(LowerOnly):
    """The pass-through, with rules before and a log after each request."""

    def __init__(self, tree: LowerTree, log: LogWriter | None) -> None:
        super().__init__(tree)
        self.rules: dict[int, Rule] = {}
        self.lifted: dict[int, Rule] = {}
        self.numbers = itertools.count(1)
        self.free_bytes: int | None = None
        self._log = log
        self._names: dict[int, tuple[int, bytes]] = {}
        self._inodes: dict[int, int] = {}  # of handles

    # -- names, rules, log

    def path_of(self, inode: int) -> str:
        parts = []
        while inode != pyfuse3.ROOT_INODE:
            if inode not in self._names:
                return ""
            inode, name = self._names[inode]
            parts.append(os.fsdecode(name))
        return "/".join(reversed(parts))

    def child(self, parent: int, name: bytes) -> str:
        return os.path.join(self.path_of(parent), os.fsdecode(name))

    def inode_at(self, parent: int, name: bytes) -> int | None:
        return next((inode for inode, known in self._names.items() if known == (parent, name)), None)

    async def strike(self, op: str, name: str) -> Rule | None:
        """Do what the first matching rule says before the request is done; the rule, if it wants more later."""
        rule = next((rule for rule in self.rules.values() if rule.matches(op, name)), None)
        if rule is None:
            return None
        if rule.kind == "hang":
            await rule.lifted.wait()
            return None
        if rule.kind == "fail":
            raise pyfuse3.FUSEError(getattr(errno, rule.error))
        return rule

    def note(self, op: str, name: str, **values: Any) -> None:
        if self._log is not None:
            self._log.add(Record(op=op, name=name, **values))

    @property
    def noted(self) -> int:
        return self._log.count if self._log is not None else 0

    # -- commands

    async def command(self, asked: dict[str, Any]) -> object:
        match asked.pop("command"):
            case "add":
                number = next(self.numbers)
                self.rules[number] = Rule(**asked)
                await self.drop_pages()
                return number
            case "lift":
                numbers = [asked["rule"]] if asked["rule"] is not None else list(self.rules)
                for number in numbers:
                    if number in self.rules:
                        rule = self.lifted[number] = self.rules.pop(number)
                        rule.lifted.set()
                await self.drop_pages()
            case "seen":
                rule = self.rules.get(asked["rule"]) or self.lifted[asked["rule"]]
                return rule.struck
            case "drop_pages":
                await self.drop_pages()
            case "claim_free":
                self.free_bytes = asked["free_bytes"]
            case "mark":
                self.note("mark", asked["text"])
        return None

    async def drop_pages(self) -> None:
        with trio.move_on_after(DROP_LIMIT_S):
            await trio.to_thread.run_sync(self._drop_pages, list(self._names), abandon_on_cancel=True)

    def _drop_pages(self, inodes: list[int]) -> None:
        for inode in inodes:
            with contextlib.suppress(OSError):  # the kernel has forgotten it
                pyfuse3.invalidate_inode(pyfuse3.InodeT(inode))

    # -- requests

    async def lookup(self, parent_inode, name, ctx):
        entry = await super().lookup(parent_inode, name, ctx)
        self._names[entry.st_ino] = (parent_inode, name)
        return entry

    async def setattr(self, inode, attr, fields, fh, ctx):
        name = self.path_of(inode)
        if fields.update_size:
            await self.strike("truncate", name)
        entry = await super().setattr(inode, attr, fields, fh, ctx)
        if fields.update_size:
            self.note("truncate", name, offset=attr.st_size)
        return entry

    async def mkdir(self, parent_inode, name, mode, ctx):
        path = self.child(parent_inode, name)
        await self.strike("mkdir", path)
        entry = await super().mkdir(parent_inode, name, mode, ctx)
        self._names[entry.st_ino] = (parent_inode, name)
        self.note("mkdir", path)
        return entry

    async def unlink(self, parent_inode, name, ctx):
        path = self.child(parent_inode, name)
        await self.strike("unlink", path)
        await super().unlink(parent_inode, name, ctx)
        self._names.pop(self.inode_at(parent_inode, name) or 0, None)
        self.note("unlink", path)

    async def rename(self, parent_old, name_old, parent_new, name_new, flags, ctx):
        old, new = self.child(parent_old, name_old), self.child(parent_new, name_new)
        await self.strike("rename", old)
        await super().rename(parent_old, name_old, parent_new, name_new, flags, ctx)
        self._names.pop(self.inode_at(parent_new, name_new) or 0, None)
        inode = self.inode_at(parent_old, name_old)
        if inode is not None:
            self._names[inode] = (parent_new, name_new)
        self.note("rename", old, other=new)

    async def link(self, inode, new_parent_inode, new_name, ctx):
        old = self.path_of(inode)
        await self.strike("link", old)
        entry = await super().link(inode, new_parent_inode, new_name, ctx)
        self.note("link", old, other=self.child(new_parent_inode, new_name))
        return entry

    async def open(self, inode, flags, ctx):
        name = self.path_of(inode)
        await self.strike("open", name)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            await self.strike("open_writing", name)
        info = await super().open(inode, flags, ctx)
        self._inodes[info.fh] = inode
        if flags & os.O_TRUNC:
            self.note("truncate", name)
        return info

    async def create(self, parent_inode, name, mode, flags, ctx):
        path = self.child(parent_inode, name)
        await self.strike("create", path)
        info, entry = await super().create(parent_inode, name, mode, flags, ctx)
        self._inodes[info.fh] = entry.st_ino
        self._names[entry.st_ino] = (parent_inode, name)
        self.note("create", path)
        return info, entry

    async def read(self, fh, off, size):
        rule = await self.strike("read", self.path_of(self._inodes[fh]))
        data = await super().read(fh, off, size)
        if rule is not None and data:
            data = bytearray(data)
            data[len(data) // 2] ^= 0xFF
        return data

    async def write(self, fh, off, buf):
        name = self.path_of(self._inodes[fh])
        await self.strike("write", name)
        written = await super().write(fh, off, buf)
        self.note("write", name, offset=off, data=bytes(buf[:written]))
        return written

    async def fsync(self, fh, datasync):
        name = self.path_of(self._inodes[fh])
        began = self.noted
        await self.strike("fsync", name)
        await super().fsync(fh, datasync)
        self.note("fsync", name, began=began)

    async def release(self, fh):
        await super().release(fh)
        del self._inodes[fh]

    async def statfs(self, ctx):
        await self.strike("statfs", "")
        data = await super().statfs(ctx)
        if self.free_bytes is not None:
            data.f_bfree = data.f_bavail = self.free_bytes // data.f_frsize
        return data


async def obey(faults: Faults, path: str, control: socket.socket) -> None:
    """Ends when the other side does; the mount goes then, too: the process that wanted it is no more."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
    buffered = b""
    await stream.send_all(b'"ready"\n')
    async for received in stream:
        buffered += received
        while b"\n" in buffered:
            line, _, buffered = buffered.partition(b"\n")
            answer = await faults.command(json.loads(line))
            await stream.send_all(json.dumps(answer).encode() + b"\n")
    await faults.command({"command": "lift", "rule": None})
    await trio.to_thread.run_sync(lambda: subprocess.run(["umount", "-l", path], capture_output=True, check=False))


async def serve(backing: str, path: str, control: socket.socket, log: LogWriter | None) -> None:
    root_fd = os.open(backing, os.O_PATH | os.O_DIRECTORY)
    tree = LowerTree(root_fd, BlockingCalls("faults", threads_max=64), MemoryEscrow(), first_handle=1)
    faults = Faults(tree, log)
    pyfuse3.init(faults, path, {"fsname=faultfs", "subtype=faultfs", "allow_other", "default_permissions"})
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, faults, path, control)
            await pyfuse3.main(max_tasks=TASKS_MAX)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)
        await tree.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    _, backing, path, control_fd, log_path = sys.argv
    with open(log_path or os.devnull, "ab") as file:
        trio.run(serve, backing, path, socket.socket(fileno=int(control_fd)), LogWriter(file) if log_path else None)

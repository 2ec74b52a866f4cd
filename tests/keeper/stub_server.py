"""A server for keeper tests: shows `img`, and `poison`, whose reads end it; does what the file `config_files[0]` says.

The mode file holds JSON: `{"at": <step>, "do": "exit" | "fail" | "hang"}` or `{}`. Steps: start, begin, serve, switch,
ready. With `"by": <version>` only servers of that version do it; the version is the second argument of the command.
Every start appends its pid to `<mode file>.pids`, every server that serves to `<mode file>.serving`.
"""

import errno
import json
import os
import signal
import socket
import stat
import sys

import pyfuse3
import trio

CONTENT = bytes(range(256)) * 4096


class OneFile(pyfuse3.Operations):
    async def getattr(self, inode, ctx=None):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o444
        entry.st_size = 0 if inode == 1 else len(CONTENT)
        return entry

    async def lookup(self, parent_inode, name, ctx=None):
        if name not in (b"img", b"poison"):
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(2 if name == b"img" else 3)

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode)

    async def opendir(self, inode, ctx):
        return inode

    async def statfs(self, ctx):
        return pyfuse3.StatvfsData()

    async def read(self, fh, offset, size):
        if fh == 3:
            os._exit(5)
        return CONTENT[offset : offset + size]


arguments = json.loads(sys.argv[-1])
VERSION = sys.argv[1] if len(sys.argv) > 2 else "1"
mode_path = arguments["config_files"][0]
control = socket.socket(fileno=arguments["keeper_fd"])


def step(name: str) -> None:
    with open(mode_path, encoding="utf-8") as file:
        mode = json.load(file)
    if mode.get("at") != name or mode.get("by", VERSION) != VERSION:
        return
    if mode["do"] == "exit":
        os._exit(3)
    if mode["do"] == "hang":
        signal.pause()
    control.send(json.dumps({"type": "failed", "error": "stub failed as told"}).encode())
    os._exit(1)


def tell(kind: str, **more: object) -> None:
    control.send(json.dumps({"type": kind, **more}).encode())


async def hear(wanted: str) -> list[int]:
    await trio.lowlevel.wait_readable(control.fileno())
    data, fds, _, _ = socket.recv_fds(control, 65536, 4)
    if not data:
        os._exit(4)
    assert json.loads(data) == {"type": wanted}, data
    return fds


async def wait_for_begin() -> None:
    while True:
        await trio.lowlevel.wait_readable(control.fileno())
        data, fds, _, _ = socket.recv_fds(control, 65536, 253)
        if not data:
            os._exit(4)
        note("heard", data.decode())
        for fd in fds:
            os.close(fd)
        if json.loads(data)["type"] == "begin":
            return


async def obey() -> None:
    while True:
        await trio.lowlevel.wait_readable(control.fileno())
        data = control.recv(65536)
        if not data:
            await trio.sleep_forever()
        message = json.loads(data)
        if message["type"] == "ping":
            tell("pong", n=message["n"])
        elif message["type"] == "stop":
            os._exit(0)


def options() -> dict[str, str]:
    with open(mode_path, encoding="utf-8") as file:
        return json.load(file).get("options", {})


async def run() -> None:
    step("start")
    tell("loaded", version=VERSION, options=options(), not_applied=[])
    await wait_for_begin()
    step("begin")
    tell("prepared")
    (fuse_fd,) = await hear("serve")
    step("serve")
    with trio.CancelScope() as handshake:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            await hear("switch")
            handshake.cancel()
    step("switch")
    os.dup2(fuse_fd, arguments["session_fd"])
    os.close(fuse_fd)
    note("serving", str(os.getpid()))
    tell("ready")
    step("ready")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def note(what: str, text: str) -> None:
    with open(f"{mode_path}.{what}", "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


note("pids", str(os.getpid()))
pyfuse3.init(OneFile(), f"/dev/fd/{arguments['session_fd']}", set())
try:
    trio.run(run)
finally:
    pyfuse3.close(unmount=False)

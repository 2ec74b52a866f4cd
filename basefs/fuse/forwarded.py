"""Requests that did not come through pyfuse3: decoded, given to the same `Operations`, answered as pyfuse3 would.

The order of calls, the errors and the flags of a reply are those of pyfuse3's handlers (handlers.pxi) over libfuse
(lib/fuse_lowlevel.c); `tests/fuse/test_forwarded.py` holds both ways against each other.
"""

import errno
import logging
import os
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from stat import S_IFDIR, S_IMODE
from typing import Any

import pyfuse3

from basefs.concurrency.guarded import guarded
from basefs.core import fuse_wire as wire
from basefs.core.fuse_wire import Opcode, Request, SetattrValid
from basefs.fuse.listing_page import ListingPage

log = logging.getLogger(__name__)

Body = bytes | bytearray | memoryview
Face = Any
"""`Operations`, whose parameters have types that only pyfuse3 can make (RequestContext, InodeT)."""
Handler = Callable[[Face, Request], Awaitable["Body | None"]]
"""Gives what follows the reply's header, None for a reply that only says that it was done."""

_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks; as `pyfuse3.RequestContext`, which nobody but pyfuse3 can make."""

    uid: int
    gid: int
    pid: int
    umask: int = 0


@dataclass(frozen=True, slots=True)
class ChangedFields:
    """What is to be changed; as `pyfuse3.SetattrFields`."""

    update_atime: bool
    update_mtime: bool
    update_ctime: bool
    update_mode: bool
    update_uid: bool
    update_gid: bool
    update_size: bool


_FORESEEN = (pyfuse3.FUSEError, ValueError, struct.error)


async def answer(operations: Face, request: Request) -> list[Body]:
    """The whole reply in pieces, to be written at once and before the next await; empty where none is due.

    Never raises but for cancellation: what no handler foresaw was logged at the edge and is EIO.
    """
    handler = _HANDLERS.get(request.opcode)
    if handler is None:
        return [wire.error_reply(request.unique, errno.ENOSYS)]
    code = errno.EIO
    try:
        with guarded(log, "bug in a forwarded request of opcode %d", request.opcode, foreseen=_FORESEEN):
            body = await handler(operations, request)
            code = 0
            if body is not None and request.opcode not in wire.NO_REPLY:
                return [wire.reply_header(request.unique, len(body)), body]
    except pyfuse3.FUSEError as exc:
        code = exc.errno
    except (ValueError, struct.error):
        code = errno.EINVAL
    return [] if request.opcode in wire.NO_REPLY else [wire.error_reply(request.unique, code)]


def read_reply(request: Request, data: Body) -> list[Body]:
    """The whole reply to a READ in pieces."""
    return [wire.reply_header(request.unique, len(data)), data]


def _caller(request: Request, umask: int = 0) -> Caller:
    return Caller(request.uid, request.gid, request.pid, umask)


# --- names ----------------------------------------------------------------------------------------------


async def _lookup(ops: Face, request: Request) -> Body:
    (name,) = request.names(0, 1)
    return wire.entry_reply(await ops.lookup(request.inode, name, _caller(request)))


async def _forget(ops: Face, request: Request) -> None:
    (count,) = wire.LOOKUP_COUNT.unpack_from(request.body)
    await ops.forget([(request.inode, count)])


async def _batch_forget(ops: Face, request: Request) -> None:
    count, _ = wire.BATCH_FORGET_IN.unpack_from(request.body)
    step, start = wire.FORGET_ONE.size, wire.BATCH_FORGET_IN.size
    pairs = wire.FORGET_ONE.iter_unpack(request.body[start : start + count * step])
    await ops.forget([(inode, lookups) for inode, lookups in pairs])


async def _readlink(ops: Face, request: Request) -> Body:
    return bytes(await ops.readlink(request.inode, _caller(request)))


async def _symlink(ops: Face, request: Request) -> Body:
    name, target = request.names(0, 2)
    return wire.entry_reply(await ops.symlink(request.inode, name, target, _caller(request)))


async def _mknod(ops: Face, request: Request) -> Body:
    mode, device, umask, _ = wire.MKNOD_IN.unpack_from(request.body)
    (name,) = request.names(wire.MKNOD_IN.size, 1)
    return wire.entry_reply(await ops.mknod(request.inode, name, mode, device, _caller(request, umask)))


async def _mkdir(ops: Face, request: Request) -> Body:
    mode, umask = wire.MKDIR_IN.unpack_from(request.body)
    (name,) = request.names(wire.MKDIR_IN.size, 1)
    mode = S_IMODE(mode) | S_IFDIR
    return wire.entry_reply(await ops.mkdir(request.inode, name, mode, _caller(request, umask)))


async def _unlink(ops: Face, request: Request) -> None:
    (name,) = request.names(0, 1)
    await ops.unlink(request.inode, name, _caller(request))


async def _rmdir(ops: Face, request: Request) -> None:
    (name,) = request.names(0, 1)
    await ops.rmdir(request.inode, name, _caller(request))


async def _rename(ops: Face, request: Request) -> None:
    (new_parent,) = wire.RENAME_IN.unpack_from(request.body)
    old, new = request.names(wire.RENAME_IN.size, 2)
    await ops.rename(request.inode, old, new_parent, new, 0, _caller(request))


async def _rename2(ops: Face, request: Request) -> None:
    new_parent, flags, _ = wire.RENAME2_IN.unpack_from(request.body)
    old, new = request.names(wire.RENAME2_IN.size, 2)
    await ops.rename(request.inode, old, new_parent, new, flags, _caller(request))


async def _link(ops: Face, request: Request) -> Body:
    (inode,) = wire.LINK_IN.unpack_from(request.body)
    (name,) = request.names(wire.LINK_IN.size, 1)
    return wire.entry_reply(await ops.link(inode, request.inode, name, _caller(request)))


# --- attributes -----------------------------------------------------------------------------------------


async def _getattr(ops: Face, request: Request) -> Body:
    return wire.attr_reply(await ops.getattr(request.inode, _caller(request)))


async def _setattr(ops: Face, request: Request) -> Body:
    (
        valid, _, handle, size, _, atime_s, mtime_s, ctime_s, atime_ns, mtime_ns, ctime_ns, mode, _, uid, gid, _,
    ) = wire.SETATTR_IN.unpack_from(request.body)  # fmt: skip
    has_atime = valid & (SetattrValid.ATIME | SetattrValid.ATIME_NOW)
    has_mtime = valid & (SetattrValid.MTIME | SetattrValid.MTIME_NOW)
    now_ns = time.time_ns()
    attributes = pyfuse3.EntryAttributes()
    attributes.st_mode, attributes.st_uid, attributes.st_gid = mode, uid, gid
    attributes.st_size = size
    attributes.st_atime_ns = atime_s * _NS + atime_ns if valid & SetattrValid.ATIME or not has_atime else now_ns
    attributes.st_mtime_ns = mtime_s * _NS + mtime_ns if valid & SetattrValid.MTIME or not has_mtime else now_ns
    attributes.st_ctime_ns = ctime_s * _NS + ctime_ns
    fields = ChangedFields(
        update_atime=bool(has_atime),
        update_mtime=bool(has_mtime),
        update_ctime=bool(valid & SetattrValid.CTIME),
        update_mode=bool(valid & SetattrValid.MODE),
        update_uid=bool(valid & SetattrValid.UID),
        update_gid=bool(valid & SetattrValid.GID),
        update_size=bool(valid & SetattrValid.SIZE),
    )
    handle = handle if valid & SetattrValid.FH else None
    return wire.attr_reply(await ops.setattr(request.inode, attributes, fields, handle, _caller(request)))


async def _access(ops: Face, request: Request) -> None:
    mask, _ = wire.ACCESS_IN.unpack_from(request.body)
    if not await ops.access(request.inode, mask, _caller(request)):
        raise pyfuse3.FUSEError(errno.EACCES)


async def _setxattr(ops: Face, request: Request) -> None:
    size, flags = wire.SETXATTR_IN.unpack_from(request.body)
    (name,) = request.names(wire.SETXATTR_IN.size, 1)
    start = wire.SETXATTR_IN.size + len(name) + 1
    value = bytes(request.body[start : start + size])
    if flags & ~(os.XATTR_CREATE | os.XATTR_REPLACE) or len(value) != size:
        raise pyfuse3.FUSEError(errno.EINVAL)
    caller = _caller(request)
    if flags & os.XATTR_CREATE:
        try:
            await ops.getxattr(request.inode, name, caller)
        except pyfuse3.FUSEError as exc:
            if exc.errno != errno.ENODATA:
                raise
        else:
            raise pyfuse3.FUSEError(errno.EEXIST)
    elif flags & os.XATTR_REPLACE:
        await ops.getxattr(request.inode, name, caller)
    await ops.setxattr(request.inode, name, value, caller)


async def _getxattr(ops: Face, request: Request) -> Body:
    size_max, _ = wire.GETXATTR_IN.unpack_from(request.body)
    (name,) = request.names(wire.GETXATTR_IN.size, 1)
    return _value_within(size_max, await ops.getxattr(request.inode, name, _caller(request)))


async def _listxattr(ops: Face, request: Request) -> Body:
    size_max, _ = wire.GETXATTR_IN.unpack_from(request.body)
    names = await ops.listxattr(request.inode, _caller(request))
    return _value_within(size_max, b"".join(name + b"\0" for name in names))


def _value_within(size_max: int, value: bytes) -> bytes:
    """The value, or its size where that is all that was asked for (0)."""
    if size_max == 0:
        return wire.size_reply(len(value))
    if len(value) > size_max:
        raise pyfuse3.FUSEError(errno.ERANGE)
    return value


async def _removexattr(ops: Face, request: Request) -> None:
    (name,) = request.names(0, 1)
    await ops.removexattr(request.inode, name, _caller(request))


async def _statfs(ops: Face, request: Request) -> Body:
    return wire.statfs_reply(await ops.statfs(_caller(request)))


# --- open files -----------------------------------------------------------------------------------------


async def _open(ops: Face, request: Request) -> Body:
    flags, _ = wire.OPEN_IN.unpack_from(request.body)
    return wire.open_reply(await ops.open(request.inode, flags, _caller(request)))


async def _create(ops: Face, request: Request) -> Body:
    flags, mode, umask, _ = wire.CREATE_IN.unpack_from(request.body)
    (name,) = request.names(wire.CREATE_IN.size, 1)
    opened, attributes = await ops.create(request.inode, name, mode, flags, _caller(request, umask))
    return wire.entry_reply(attributes) + wire.open_reply(opened)


async def _read(ops: Face, request: Request) -> Body:
    handle, offset, size, *_ = wire.READ_IN.unpack_from(request.body)
    data: Body = await ops.read(handle, offset, size)
    return data


async def _write(ops: Face, request: Request) -> Body:
    handle, offset, size, *_ = wire.READ_IN.unpack_from(request.body)
    data = bytes(request.body[wire.READ_IN.size : wire.READ_IN.size + size])
    if len(data) != size:
        raise pyfuse3.FUSEError(errno.EIO)
    return wire.size_reply(await ops.write(handle, offset, data))


async def _flush(ops: Face, request: Request) -> None:
    handle, *_ = wire.FLUSH_IN.unpack_from(request.body)
    await ops.flush(handle)


async def _release(ops: Face, request: Request) -> None:
    handle, *_ = wire.RELEASE_IN.unpack_from(request.body)
    await ops.release(handle)


async def _fsync(ops: Face, request: Request) -> None:
    handle, flags, _ = wire.FSYNC_IN.unpack_from(request.body)
    await ops.fsync(handle, bool(flags & 1))


# --- directories ----------------------------------------------------------------------------------------


async def _opendir(ops: Face, request: Request) -> Body:
    return wire.opendir_reply(await ops.opendir(request.inode, _caller(request)))


async def _readdirplus(ops: Face, request: Request) -> Body:
    handle, offset, size, *_ = wire.READ_IN.unpack_from(request.body)
    page = ListingPage(size)
    await ops.readdir(handle, offset, page)
    return page.data


async def _releasedir(ops: Face, request: Request) -> None:
    handle, *_ = wire.RELEASE_IN.unpack_from(request.body)
    await ops.releasedir(handle)


async def _fsyncdir(ops: Face, request: Request) -> None:
    handle, flags, _ = wire.FSYNC_IN.unpack_from(request.body)
    await ops.fsyncdir(handle, bool(flags & 1))


async def _nothing(ops: Face, request: Request) -> None:
    """DESTROY is answered; INTERRUPT is not heeded: pyfuse3 does not stop what it interrupts either."""


_HANDLERS: dict[int, Handler] = {
    Opcode.LOOKUP: _lookup,
    Opcode.FORGET: _forget,
    Opcode.GETATTR: _getattr,
    Opcode.SETATTR: _setattr,
    Opcode.READLINK: _readlink,
    Opcode.SYMLINK: _symlink,
    Opcode.MKNOD: _mknod,
    Opcode.MKDIR: _mkdir,
    Opcode.UNLINK: _unlink,
    Opcode.RMDIR: _rmdir,
    Opcode.RENAME: _rename,
    Opcode.LINK: _link,
    Opcode.OPEN: _open,
    Opcode.READ: _read,
    Opcode.WRITE: _write,
    Opcode.STATFS: _statfs,
    Opcode.RELEASE: _release,
    Opcode.FSYNC: _fsync,
    Opcode.SETXATTR: _setxattr,
    Opcode.GETXATTR: _getxattr,
    Opcode.LISTXATTR: _listxattr,
    Opcode.REMOVEXATTR: _removexattr,
    Opcode.FLUSH: _flush,
    Opcode.OPENDIR: _opendir,
    Opcode.RELEASEDIR: _releasedir,
    Opcode.FSYNCDIR: _fsyncdir,
    Opcode.ACCESS: _access,
    Opcode.CREATE: _create,
    Opcode.INTERRUPT: _nothing,
    Opcode.DESTROY: _nothing,
    Opcode.BATCH_FORGET: _batch_forget,
    Opcode.READDIRPLUS: _readdirplus,
    Opcode.RENAME2: _rename2,
}

"""rados and rbd in memory: as much of both modules as basefs uses, with threads that complete as the real ones do.

What is not there reads as zeros, as librbd reads it: also when the image was removed under who has it open.
"""

import errno
import struct
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from basefs.sources.ceph_cluster import CephLibrary

OBJECT_BYTES = 256 * 1024


class Error(Exception):
    def __init__(self, message: str, errno: int) -> None:
        super().__init__(f"[errno {errno}] {message}")
        self.errno = errno


@dataclass(eq=False)
class StoredImage:
    """One RBD image; `snapshot_id` None: its snapshot was removed. `has_map`: it has an object map."""

    header_id: str
    data: bytes
    has_map: bool = True
    snapshot_id: int | None = 4


@dataclass(eq=False)
class MemoryCeph:
    """The cluster. `code`: while set, what calls fail with; `answers` not set: nothing is answered.

    `confirms`: questions for a snapshot in the header; while `confirming` is not set none is answered.
    """

    fsid: str = "0b6b1c2e-1111-4222-8333-444455556666"
    images: dict[tuple[str, str], StoredImage] = field(default_factory=dict)
    code: int = 0
    reads_before_code: int = 0
    answers: threading.Event = field(default_factory=threading.Event)
    reads: int = 0
    confirms: int = 0
    confirming: threading.Event = field(default_factory=threading.Event)
    opened: int = 0
    connections: int = 0

    def __post_init__(self) -> None:
        self.answers.set()
        self.confirming.set()

    @property
    def library(self) -> CephLibrary:
        """The modules."""
        return CephLibrary(rados=_Rados(self), rbd=_Rbd(self))

    def add(self, image_id: str, data: bytes, *, pool: str = "images", has_map: bool = True) -> str:
        """Have the image there; its location."""
        self.images[pool, image_id] = StoredImage(uuid.uuid4().hex, data, has_map)
        return f"rbd://{self.fsid}/{pool}/{image_id}/snap"

    def check(self) -> None:
        self.answers.wait()
        if self.code:
            raise Error("told to fail", self.code)

    def complete(self, result: Callable[[], tuple[int, bytes | None]], oncomplete: Callable[[Any, Any], None]) -> None:
        def run() -> None:
            self.answers.wait()
            code, data = result()
            oncomplete(_Completion(code), data)

        threading.Thread(target=run, daemon=True).start()


@dataclass
class _Completion:
    code: int

    def get_return_value(self) -> int:
        return self.code


class _Rados:
    Error = Error

    class ObjectNotFound(Error):  # noqa: N818  rados' own name
        pass

    def __init__(self, ceph: MemoryCeph) -> None:
        self._ceph = ceph

    def Rados(self, *, conffile: str, rados_id: str, conf: dict[str, str]) -> "_Client":  # noqa: N802
        assert conf["rados_osd_op_timeout"]
        return _Client(self._ceph)


class _Client:
    def __init__(self, ceph: MemoryCeph) -> None:
        self._ceph = ceph
        self._is_connected = False

    def connect(self, timeout: int) -> None:
        self._ceph.check()
        self._ceph.connections += 1
        self._is_connected = True

    def get_fsid(self) -> str:
        return self._ceph.fsid

    def open_ioctx(self, name: str) -> "_Pool":
        return _Pool(self._ceph, name)

    def shutdown(self) -> None:
        if self._is_connected:
            self._is_connected = False
            self._ceph.connections -= 1


class _Pool:
    def __init__(self, ceph: MemoryCeph, name: str) -> None:
        self.ceph = ceph
        self.name = name

    def aio_execute(self, name: str, cls: str, method: str, data: bytes, length: int, oncomplete: Any) -> None:
        assert (cls, method) == ("rbd", "get_snapshot_name")
        assert struct.unpack("<Q", data) == (4,)

        def look() -> tuple[int, bytes | None]:
            self.ceph.confirms += 1
            if self.ceph.code and not self.ceph.reads_before_code:
                return -self.ceph.code, None
            self.ceph.confirming.wait()
            found = {f"rbd_header.{one.header_id}": one.snapshot_id for one in self.ceph.images.values()}
            here = found.get(name) == 4
            return (0, b"snap") if here else (-errno.ENOENT, None)

        self.ceph.complete(look, oncomplete)

    def close(self) -> None:
        pass


class _Rbd:
    Error = Error
    RBD_FEATURE_FAST_DIFF, RBD_FLAG_FAST_DIFF_INVALID, RBD_FLAG_OBJECT_MAP_INVALID = 16, 2, 1

    def __init__(self, ceph: MemoryCeph) -> None:
        self._ceph = ceph

    def Image(self, pool: _Pool, name: str, *, snapshot: str, read_only: bool) -> "_Image":  # noqa: N802
        assert read_only
        self._ceph.check()
        found = self._ceph.images.get((pool.name, name))
        if found is None or snapshot != "snap":
            raise Error("no such image", errno.ENOENT)
        self._ceph.opened += 1
        return _Image(self._ceph, found)


class _Image:
    def __init__(self, ceph: MemoryCeph, stored: StoredImage) -> None:
        self._ceph = ceph
        self._stored = stored

    def old_format(self) -> bool:
        return False

    def stripe_count(self) -> int:
        return 1

    def stat(self) -> dict[str, int]:
        return {"obj_size": OBJECT_BYTES}

    def size(self) -> int:
        return len(self._stored.data)

    def id(self) -> str:
        return self._stored.header_id

    def snap_get_id(self, name: str) -> int:
        return 4

    def features(self) -> int:
        return 61 if self._stored.has_map else 1

    def flags(self) -> int:
        return 0

    def diff_iterate(
        self, offset: int, length: int, since: None, iterate_cb: Any, *, include_parent: bool, whole_object: bool
    ) -> None:
        assert include_parent
        assert whole_object
        for start in range(0, length, OBJECT_BYTES):
            part = self._stored.data[start : start + OBJECT_BYTES]
            if any(part):
                iterate_cb(start, len(part), True)

    def aio_read(self, offset: int, length: int, oncomplete: Any) -> None:
        self._ceph.reads += 1
        number = self._ceph.reads

        def read() -> tuple[int, bytes | None]:
            if self._ceph.code and number > self._ceph.reads_before_code:
                return -self._ceph.code, None
            here = self._stored in self._ceph.images.values()
            return length, self._stored.data[offset : offset + length] if here else bytes(length)

        self._ceph.complete(read, oncomplete)

    def close(self) -> None:
        self._ceph.answers.wait()
        self._ceph.opened -= 1

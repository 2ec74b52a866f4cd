"""What is fuzzed: functions of bytes that raise when basefs does what it must not: a wrong byte, an error not ours.

They import what they test when they are made, which is under atheris' instrumentation.
"""

import base64
import itertools
import json
import os
import random
import shutil
import socket
import sqlite3
import tempfile
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from email.message import Message
from pathlib import Path
from typing import Any

Target = Callable[[bytes], None]

CHUNK = 16 * 1024
IMAGE = random.Random(1).randbytes(5 * CHUNK + 1000)
INODE = (1 << 32) + 7
SPLICES_MAX = 6


def spliced(good: bytes, data: bytes) -> bytes:
    """`good` with up to SPLICES_MAX pieces replaced as `data` says; without a piece, `data` itself."""
    if len(data) < 4:
        return data
    result = bytearray(good)
    for _ in range(1 + data[0] % SPLICES_MAX):
        at, data = int.from_bytes(data[1:4], "little") % (len(result) + 1), data[4:]
        if len(data) < 4:
            break
        length = data[0] % 32
        result[at : at + length] = data[1 : 1 + length]
        data = data[length:]
    return bytes(result)


def chunk_files(directory: Path) -> Target:
    """Chunk map and chunks on the disk: a chunk is the image's, or none."""
    from basefs import errors
    from basefs.cache.chunk_file import data_path, map_path, open_chunk_file
    from basefs.core.chunk_map import ChunkMapHeader

    wanted = ChunkMapHeader(image_id="11111111-2222-3333-4444-555555555555", size=len(IMAGE), chunk_bytes=CHUNK)
    made, _ = open_chunk_file(directory, INODE, wanted)
    made.write_piece(0, IMAGE)
    made.close()
    paths = (map_path(directory, INODE), data_path(directory, INODE))
    good = [path.read_bytes() for path in paths]

    def target(data: bytes) -> None:
        which = data[0] % 3 if data else 0
        for path, content in zip(paths, good, strict=True):
            path.write_bytes(content)
        if which != 1:
            paths[0].write_bytes(spliced(good[0], data[1:]))
        if which != 0:
            paths[1].write_bytes(spliced(good[1], data[1:]))
        try:
            file, states = open_chunk_file(directory, INODE, wanted)
        except errors.CacheError:
            return
        with closing(file):
            step = file.header.chunk_bytes
            for index, chunk in enumerate(file.verify(0, len(states))):
                right = IMAGE[index * step : (index + 1) * step]
                assert chunk is None or not states[index] or bytes(chunk) == right, f"wrong bytes in chunk {index}"

    return target


def state_database(_directory: Path) -> Target:
    """The state database: its images are well formed, or it is damaged."""
    from basefs.cache import state_rows
    from basefs.catalog.records import LocalState

    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        state_rows.prepare(db)
        for number in range(1, 6):
            image_id = f"{number}1111111-2222-3333-4444-555555555555"
            record = dict.fromkeys(state_rows.RECORD_FIELDS) | {"image_id": image_id, "size": 1000, "name": "x"}
            record |= {"status": "active", "visibility": "public", "created_at": "", "updated_at": ""}
            record |= {"os_hidden": False, "is_signed": False}
            local = json.dumps({name: getattr(LocalState(), name) for name in LocalState.__slots__})
            db.execute(
                "INSERT INTO image (number, image_id, record, local) VALUES (?, ?, ?, ?)",
                (number, image_id, json.dumps(record), local),
            )
        good = bytes(db.serialize())

    def target(data: bytes) -> None:
        try:
            with closing(state_rows.in_memory(spliced(good, data))) as db:
                state_rows.prepare(db)
                entries = state_rows.read_entries(db)
        except Exception as exc:
            if isinstance(exc, sqlite3.Error) or state_rows.is_damage(exc):
                return
            raise
        for entry in entries:
            assert entry.size >= 0
            assert entry.local.cached_bytes >= 0
            assert entry.local.fetched_bytes >= 0
            state_rows.local_row(entry)

    return target


def boot_traces(_directory: Path) -> Target:
    """Boot traces, of this node, imported or in a property: refused, or within bounds and the same when written."""
    from basefs.core.boot_trace import BootTrace, TracedImage, TraceRange
    from basefs.core.trace_file import parse_trace, trace_bytes
    from basefs.core.trace_plan import requests_for
    from basefs.core.trace_property import property_of, trace_of_property

    image = TracedImage(image_id="11111111", size=1 << 30, os_hash_algo="sha512", os_hash_value="0f" * 64)
    ranges = (TraceRange(16383, 1, 0), TraceRange(0, 9, 3), TraceRange(500, 20, 70, 2), TraceRange(100, 1, 9000, 1))
    trace = BootTrace(image=image, boots=3, by_guest=True, ranges=ranges)
    good = trace_bytes(trace)
    packed = zlib.decompress(base64.urlsafe_b64decode(property_of(trace).partition(":")[2]))

    def property_target(data: bytes) -> None:
        inner = packed[:16] + spliced(packed[16:], data)  # as long as the digest is right somebody looks at the rest
        with suppress(ValueError):
            found = trace_of_property(f"1:{base64.urlsafe_b64encode(zlib.compress(inner)).decode()}", image)
            assert trace_of_property(property_of(found), image) == found
            assert 0 <= found.traced_bytes <= image.size

    def target(data: bytes) -> None:
        property_target(data)
        trace, said = None, ""
        try:
            trace = parse_trace(spliced(good, data))
        except ValueError as exc:
            said = str(exc)
        if trace is None:
            assert 0 < len(said) < 500
            return
        assert parse_trace(trace_bytes(trace)) == trace
        size, chunk_bytes = trace.image.size, 64 * 1024
        assert 0 <= trace.traced_bytes <= size
        for request in requests_for(trace.units(), size=size, chunk_bytes=chunk_bytes, gap_bytes=128 * 1024):
            assert 0 <= request.start < request.stop <= -(-size // chunk_bytes)

    return target


def http_headers(_directory: Path) -> Target:
    """Headers that Glance, or who stands in front of it, answers with."""
    from basefs.core.byte_ranges import parse_content_range
    from basefs.sources.http_errors import retry_after_s, text_of_body

    def target(data: bytes) -> None:
        text = data.decode("latin-1")
        with suppress(ValueError):
            came = parse_content_range(text)
            assert 0 <= came.first <= came.last
            assert came.total is None or came.last < came.total
        headers = Message()
        for bad in "\r\n\0":
            text = text.replace(bad, " ")
        headers["Retry-After"] = text
        seconds = retry_after_s(dict(headers.items()))
        assert seconds is None or 0 <= seconds <= 3600
        assert len(text_of_body(data)) <= 300

    return target


def overlays(_directory: Path) -> Target:
    """Headers of disks of instances, which guests' owners may have written: a short name of a base, or ours."""
    from basefs.core.qcow2_header import HEADER_BYTES, NAME_BYTES_MAX, backing_name, base_names_in

    def target(data: bytes) -> None:
        with suppress(ValueError):
            where = backing_name(data[:HEADER_BYTES])
            if where is not None:
                assert 0 < where.length <= NAME_BYTES_MAX
                assert HEADER_BYTES <= where.offset < 1 << 21
        for name in base_names_in(data[HEADER_BYTES:]):
            assert len(name) == 40
            assert int(name, 16) >= 0

    return target


def metadata(_directory: Path) -> Target:
    """What Glance says of an image."""
    from basefs.catalog.glance_images import earlier, record_of

    def target(data: bytes) -> None:
        earlier(data.decode("latin-1"), 60.0)
        try:
            image = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(image, dict):
            record = record_of(image)
            if record is not None:
                json.dumps(record.name).encode()
                assert record.size is None or record.size >= 0

    return target


def control_requests(_directory: Path) -> Target:
    """Requests over the control socket: any method, path, query, headers, body."""
    import trio

    from basefs.control.server import _application, _Bounded
    from tests.control.fake_view import FakeView

    app = _Bounded(_application(FakeView()), requests_max=4)

    def target(data: bytes) -> None:
        parts = [*data.split(b"\n", 4), b"", b"", b"", b""][:5]
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": parts[0].decode("latin-1")[:20] or "GET",
            "raw_path": parts[1],
            "path": "/" + parts[1].decode("utf-8", "replace"),
            "query_string": parts[2],
            "headers": [(b"host", b"basefs"), (parts[3][:50].lower(), parts[3][50:])],
            "client": None,
            "server": None,
        }
        statuses: list[int] = []
        gone: dict[str, Any] = {"type": "http.disconnect"}
        body: dict[str, Any] = {"type": "http.request", "body": parts[4], "more_body": False}
        messages = itertools.chain([body], itertools.repeat(gone))

        async def receive() -> dict[str, Any]:
            await trio.lowlevel.checkpoint()
            return next(messages)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        async def call() -> None:
            with trio.move_on_after(2):
                await app(scope, receive, send)

        with suppress(ZeroDivisionError):  # the fake's own bug
            trio.run(call)
            assert all(status < 500 or status == 503 for status in statuses), statuses

    return target


def keeper_datagrams(_directory: Path) -> Target:
    """Datagrams of a server to its keeper, and requests to the keeper over its socket."""
    from basefs.keeper_requests import _read
    from basefs.server_process import ServerProcess

    def target(data: bytes) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            server = object.__new__(ServerProcess)
            server.control = ours
            theirs.send(data or b" ")
            received = server.receive()
            assert received is not None
            assert isinstance(received[0], dict)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            ours.setblocking(False)
            theirs.send(data or b" ")
            _read(ours)

    return target


def qcow2_images(directory: Path) -> Target:
    """qcow2 files of qemu, and of other layouts: refused, or the same bytes each time, or damage that is told."""
    import trio

    from basefs import errors
    from basefs.core.qcow2_header import qcow2_layout_of
    from tests.views.conftest import entry_of, read, view_of
    from tests.views.memory_stored import MemoryStored
    from tests.views.qcow2_files import create, io
    from tests.views.qcow2_writer import Cluster, Shape, Writer

    kinds = [Cluster(kind="data", seed=1), Cluster(kind="packed", seed=2), Cluster(kind="zero")]
    kinds += [Cluster(kind="zero-allocated", seed=3), Cluster()]
    shapes = [
        Shape(cluster_bits=9),
        Shape(cluster_bits=12, compression="zstd"),
        Shape(cluster_bits=14, has_subclusters=True),
    ]
    files = [Writer(shape, kinds * 2).data for shape in shapes]
    for options in (("cluster_size=512",), ("compat=0.10", "cluster_size=4k"), ("extended_l2=on", "cluster_size=16k")):
        create(directory / "image", *options, size=1 << 16)
        io(directory / "image", "write -P 1 4k 2k", "write -c -P 2 16k 16k", "write -z 40k 8k")
        files.append((directory / "image").read_bytes())

    async def check(data: bytes, size: int) -> None:
        view = view_of(MemoryStored(data), entry_of(data))
        answers: list[bytes | None] = []
        for offset, length in [(0, 1 << 16), (max(0, size - 5000), 5000), (5000, 3000), (0, 1 << 16), (5000, 3000)]:
            try:
                found = await read(view, offset, length)
            except errors.ImageDamagedError:
                answers.append(None)
            else:
                assert len(found) == max(0, min(length, size - offset))
                answers.append(found)
        assert answers[:1] + answers[2:3] == answers[3:], "cold and warm are the same"
        if answers[0] is not None and answers[2] is not None:
            assert answers[0][5000:8000] == answers[2]

    def target(data: bytes) -> None:
        file = spliced(files[data[0] % len(files)], data[1:]) if data else b""
        try:
            layout = qcow2_layout_of(file, stored_size=len(file))
        except ValueError:
            return
        assert layout.l1_bytes <= len(file)
        trio.run(check, file, layout.size)

    return target


def deflate_streams(_directory: Path) -> Target:
    """Compressed clusters: what zlib makes of them, which qemu uses, whatever inflates them."""
    import zlib

    from basefs.views.qcow2_inflate import inflate

    cluster = 1 << 16
    text = b"".join(b"%d bottles of beer on wall %d, " % (n, n * n) for n in range(cluster // 16))[:cluster]
    streams = []
    for content, window_bits, strategy in (
        (text, -12, zlib.Z_DEFAULT_STRATEGY),
        (text, -15, zlib.Z_DEFAULT_STRATEGY),
        (text, -12, zlib.Z_FIXED),
        (IMAGE[: cluster // 2] + bytes(cluster // 2), -12, zlib.Z_HUFFMAN_ONLY),
        (text[: cluster // 2], -12, zlib.Z_DEFAULT_STRATEGY),
    ):
        packer = zlib.compressobj(9, zlib.DEFLATED, window_bits, 9, strategy)
        streams.append(packer.compress(content) + packer.flush())

    def target(data: bytes) -> None:
        packed = spliced(streams[data[0] % len(streams)], data[1:]) if data else b""
        try:
            found = zlib.decompressobj(-15).decompress(packed, cluster)
        except zlib.error:
            found = b""
        try:
            assert inflate(packed, cluster, "zlib") == found
        except ValueError:
            assert len(found) < cluster

    return target


TARGETS: dict[str, tuple[Callable[[Path], Target], list[bytes]]] = {
    "chunk-files": (chunk_files, [b"\0" * 8, b"\1\0\0\1\0\x08abcdefgh", b"\2\3\0\2\0\x10" + bytes(range(64))]),
    "state-database": (state_database, [b"\0" * 8, b"\1\0\x20\0\x04null", b'\2\0\x1f\0\x08{}[]12""']),
    "boot-traces": (boot_traces, [b"\0" * 8, b"\1\xf0\0\0\x049999", b"\2\x40\0\0\x02[]\xa0\0\0\x03,1]"]),
    "http-headers": (
        http_headers,
        [b"bytes 0-9/10", b"bytes 0-9/*", b"120", b"Wed, 21 Oct 2026 07:28:00 GMT", b"9" * 400, b"<title>x</title>"],
    ),
    "overlays": (
        overlays,
        [
            b"QFI\xfb" + bytes.fromhex("00000003 0000000000000070 00000028 00000010") + bytes(48) + b"a" * 40,
            b"QFI\xfb",
            b"\xff" * 72 + b"json:{" + b"0" * 40 + b"}",
        ],
    ),
    "qcow2-images": (
        qcow2_images,
        [
            *(bytes([which]) for which in range(6)),
            *(bytes([which, 0, 0x48, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 2]) for which in range(6)),
            *(
                bytes([which, 1, 0, 6, 0, 8, 0x40]) + bytes(7) + bytes([1, 8, 2, 0, 8, 0x80, 0, 0, 0, 0, 0, 4, 0])
                for which in range(6)
            ),
        ],
    ),
    "deflate-streams": (
        deflate_streams,
        [
            *(bytes([which]) for which in range(5)),
            *(bytes([which, 3, at, 0, 0, 4, 0x55, 0xAA, 0, 1]) for which in range(5) for at in (0, 4, 40)),
        ],
    ),
    "metadata": (metadata, [b'{"id": "1", "status": "active", "size": 3}', b"2026-11-22T00:00:00Z", b"[" * 5000]),
    "control-requests": (
        control_requests,
        [
            b"GET\nv1/status",
            b"POST\nv1/images/one/warm\nwait=false",
            b"POST\nv1/images/open/evict",
            b"GET\nv1/images/a/b",
            b"GET\nv1/maps/one\ncells=100",
            b"GET\nv1/maps\n\xff",
        ],
    ),
    "keeper-datagrams": (
        keeper_datagrams,
        [b'{"type": "pong", "n": 1}', b'{"request": "status"}', b"[]", b"[" * 60_000, b'{"request": {}}', b"\xff"],
    ),
}


def made(name: str) -> tuple[Target, list[bytes], Callable[[], None]]:
    """A target, its seeds, and what takes its directory away."""
    make, seeds = TARGETS[name]
    directory = Path(tempfile.mkdtemp(prefix="basefs-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    return make(directory), seeds, lambda: shutil.rmtree(directory, ignore_errors=True)

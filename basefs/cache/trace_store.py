"""Boot traces on the disk: `<cache_dir>/traces/<base name>.json`, apart from the chunks, so that they outlive those.

A trace is a hint of what to fetch first. What is damaged, hostile or of other bytes is told once and not used; the next
boot that is recorded takes its place.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path

import trio

from basefs import errors
from basefs.cache.trace_sharing import TraceSharing
from basefs.catalog.records import ImageEntry
from basefs.concurrency.threads import BlockingCalls
from basefs.core.boot_trace import BootTrace, TracedImage, merged
from basefs.core.names import is_base_name
from basefs.core.trace_file import FILE_BYTES_MAX, trace_bytes, trace_for
from basefs.observability import ConditionLog

log = logging.getLogger(__name__)

TRACES_MAX = 1000
"""When a server is started the traces that were written least recently are removed: 6 MB at the size of the recorded
boot's, 64 MB at the most."""
_SUFFIX = ".json"


def traced_image(entry: ImageEntry) -> TracedImage:
    """The bytes that a trace of the image must be of."""
    record = entry.record
    return TracedImage(
        image_id=record.image_id,
        size=entry.size,
        os_hash_algo=record.os_hash_algo,
        os_hash_value=record.os_hash_value,
    )


class TraceStore:
    """All traces of the node. Owned by the trio loop; files are read and written in threads."""

    def __init__(self, directory: Path, disk: BlockingCalls, sharing: TraceSharing | None = None) -> None:
        """`sharing`: with other nodes; None: there is none."""
        self._directory = directory
        self._disk = disk
        self._sharing = sharing
        self._names: set[str] = set()
        self._writing = trio.Lock()
        self._told = ConditionLog(log, clock=trio.current_time)

    async def load(self) -> None:
        """Learn which traces there are; those beyond TRACES_MAX are removed. Does nothing where the disk fails."""
        try:
            self._names |= await self._disk.run(_names_of_newest, self._directory)
        except OSError as exc:
            log.debug("boot traces: %s", exc)

    def may_have(self, entry: ImageEntry) -> bool:
        """False where there is no trace of the image, as far as is known: `load` takes a moment."""
        return entry.base_name in self._names or (self._sharing is not None and entry.record.boot_trace is not None)

    async def read(self, entry: ImageEntry) -> BootTrace | None:
        """The image's trace, or else the one that another node has shared; None where there is none of its bytes."""
        trace = await self._read_own(entry)
        if trace is None and self._sharing is not None:
            trace = self._sharing.shared(entry, traced_image(entry))
        return trace

    async def _read_own(self, entry: ImageEntry) -> BootTrace | None:
        image, why = traced_image(entry), ""
        try:
            return await self._disk.run(_read, self._path(entry), image)
        except FileNotFoundError:
            self._names.discard(entry.base_name)
            return None
        except OSError as exc:
            log.debug("boot trace of image %s: %s", entry.image_id, exc)
            return None
        except ValueError as exc:
            why = str(exc)
        self._told.begins(
            entry.base_name, logging.WARNING, "image %s: its boot trace %s is not used: %s",
            entry.image_id, self._path(entry), why,
        )  # fmt: skip
        return None

    async def add(self, entry: ImageEntry, trace: BootTrace) -> None:
        """Merge what one boot has read. Never fails: a disk that does not take it costs the trace.

        Cancellation: a write that has begun is waited for.
        """
        async with self._writing:
            trace = merged(await self.read(entry), trace)
            try:
                await self._write(entry, trace)
            except errors.CacheError as exc:
                log.info("%s", exc)
            else:
                if self._sharing is not None:
                    self._sharing.offer(entry, trace)
                log.info(
                    "image %s: its boot trace has %d bytes of %d boots", entry.image_id, trace.traced_bytes, trace.boots
                )

    async def put(self, entry: ImageEntry, trace: BootTrace) -> None:
        """Have this trace from now on, which is of the image's bytes; CacheError if the disk does not take it."""
        async with self._writing:
            await self._write(entry, trace)

    async def _write(self, entry: ImageEntry, trace: BootTrace) -> None:
        try:
            await self._disk.run(_write, self._path(entry), trace_bytes(trace))
        except OSError as exc:
            raise errors.CacheError(f"image {entry.image_id}: its boot trace was not written: {exc}") from exc
        self._names.add(entry.base_name)

    def _path(self, entry: ImageEntry) -> Path:
        return self._directory / (entry.base_name + _SUFFIX)


def _read(path: Path, image: TracedImage) -> BootTrace:
    """In a thread, for a trace of the most ranges takes some ms. OSError, ValueError: there is none of `image`."""
    with open(path, "rb") as file:
        return trace_for(file.read(FILE_BYTES_MAX + 1), image)


def _write(path: Path, data: bytes) -> None:
    """In a thread: the whole file, or the one before it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave an empty file under the name
    os.replace(part, path)


def _names_of_newest(directory: Path) -> set[str]:
    """In a thread: the base names that have a trace, less those that were removed."""
    paths = [path for path in directory.glob("*" + _SUFFIX) if is_base_name(path.stem)]
    if len(paths) > TRACES_MAX:
        paths.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in paths[TRACES_MAX:]:
            with suppress(FileNotFoundError):
                path.unlink()
    return {path.stem for path in paths[:TRACES_MAX]}

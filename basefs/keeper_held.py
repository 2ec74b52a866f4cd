"""What servers gave to hold: fds that outlive them, each with a key and a note. Standard library only.

Invariants:
- An entry's fd is open here; what is replaced, dropped or refused is closed at once.
- Entries, bytes of a note and so the memory are bounded; what is refused is logged once, and the server goes on.
- A keeper that can die keeps what it holds in `keep` as well, before `take` returns.
"""

import json
import logging
import os
import resource
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

log = logging.getLogger("basefs.keeper")

ENTRIES_MAX = 16_384
OTHER_FDS = 128
"""Fds of the fd limit that are left to everything else."""
KEY_AND_NOTE_BYTES_MAX = 960
"""A slot of the fd store's notes has room for that."""
FDS_A_DATAGRAM_MAX = 100
"""The kernel allows 253."""
ITEMS_BYTES_MAX = 48 * 1024
"""A datagram's items; a server reads at most 64 KiB."""


class Receiver(Protocol):
    """A server as far as it is told what is held."""

    control: socket.socket

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Hand over one datagram."""


class Keep(Protocol):
    """A second place for what is held, that outlives the keeper (keeper_fd_store)."""

    def put(self, key_and_note: bytes, fd: int) -> int | None:
        """Keep a copy of the fd; the number to `forget` it by, None if it is not kept."""

    def forget(self, number: int) -> None:
        """Let go of the copy with that number."""

    def put_channel(self, fd: int) -> None:
        """Keep our end of the socket over which the server that serves from now on says what to hold."""


class _Held(NamedTuple):
    text: bytes
    """The JSON of `[key, note]`."""
    fd: int
    kept_as: int | None


class HeldFds:
    """The fds of one session, by key, in the order in which they came. `close` gives all of them back."""

    def __init__(self, *, keep: Keep | None = None, entries_max: int | None = None) -> None:
        self._keep = keep
        self._entries_max = fd_limit() - OTHER_FDS if entries_max is None else entries_max
        self._entries: dict[str, _Held] = {}
        self._told: set[str] = set()
        self.before_first_send: Callable[[], None] | None = None
        """Called once, when the first server is to serve: what an earlier keeper's server holds comes by then."""

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, key: str, note: object, fd: int) -> None:
        """Hold `fd`, which is ours from now on; the same key again replaces what was held under it."""
        text = json.dumps([key, note], separators=(",", ":")).encode()
        refusal = self._refusal(key, text)
        if refusal:
            os.close(fd)
            self._tell_once(refusal)
            return
        kept_as = None if self._keep is None else self._keep.put(text, fd)
        old = self._entries.get(key)
        self._entries[key] = _Held(text, fd, kept_as)
        if old is not None:
            self._let_go(old)

    def restore(self, key_and_note: bytes, fd: int, kept_as: int) -> None:
        """Hold what an earlier keeper held and `keep` has kept.

        Raises:
            ValueError: The text is none that `take` made; the fd stays the caller's.
        """
        key, _note = json.loads(key_and_note)
        if not isinstance(key, str) or key in self._entries:
            raise ValueError(f"not a new key: {key!r}")
        self._entries[key] = _Held(key_and_note, fd, kept_as)

    def drop(self, key: str) -> None:
        """Hold it no longer; a key that is not held is none of our business."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._let_go(entry)
            self._told.clear()

    def fd_of(self, key: str) -> int | None:
        """The fd that is held under the key; it stays ours."""
        entry = self._entries.get(key)
        return None if entry is None else entry.fd

    def has_any(self, prefix: str) -> bool:
        """Whether something is held under a key that begins so."""
        return any(key.startswith(prefix) for key in self._entries)

    def send_to(self, server: Receiver) -> None:
        """Give the server a copy of everything: `held` datagrams of at most 100 fds each, none if nothing is held."""
        before_first_send, self.before_first_send = self.before_first_send, None
        if before_first_send is not None:
            before_first_send()
        if self._keep is not None:
            self._keep.put_channel(server.control.fileno())
        for batch in self._batches():
            items = [json.loads(entry.text) for entry in batch]
            server.send({"type": "held", "items": items}, [entry.fd for entry in batch])

    def close(self) -> None:
        """Let go of everything: the session is over."""
        for key in list(self._entries):
            self.drop(key)

    def close_copies(self) -> None:
        """Close our copies and leave what is kept: the next keeper goes on."""
        for entry in self._entries.values():
            os.close(entry.fd)
        self._entries.clear()

    def _batches(self) -> Iterator[list[_Held]]:
        batch: list[_Held] = []
        size_bytes = 0
        for entry in self._entries.values():
            if batch and (len(batch) == FDS_A_DATAGRAM_MAX or size_bytes + len(entry.text) > ITEMS_BYTES_MAX):
                yield batch
                batch, size_bytes = [], 0
            batch.append(entry)
            size_bytes += len(entry.text) + 2
        if batch:
            yield batch

    def _refusal(self, key: object, text: bytes) -> str:
        if not isinstance(key, str):
            return "a key that is no text"
        if len(text) > KEY_AND_NOTE_BYTES_MAX:
            return f"a note of more than {KEY_AND_NOTE_BYTES_MAX} bytes"
        if key not in self._entries and len(self._entries) >= self._entries_max:
            return f"more than {self._entries_max} fds"
        return ""

    def _let_go(self, entry: _Held) -> None:
        os.close(entry.fd)
        if self._keep is not None and entry.kept_as is not None:
            self._keep.forget(entry.kept_as)

    def _tell_once(self, refusal: str) -> None:
        if refusal not in self._told:
            self._told.add(refusal)
            log.warning("not held for the next server: %s", refusal)


def raise_fd_limit() -> None:
    """Have room for ENTRIES_MAX, or as much as the hard limit gives; a login's soft limit of 1,024 is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENTRIES_MAX + OTHER_FDS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def fd_limit() -> int:
    """How many fds this process may have, at most ENTRIES_MAX more than OTHER_FDS."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = soft if soft != resource.RLIM_INFINITY else ENTRIES_MAX + OTHER_FDS
    return min(limit, ENTRIES_MAX + OTHER_FDS)

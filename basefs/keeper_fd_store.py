"""What outlives the keeper in systemd's fd store: names, and the notes on held fds. Standard library only.

Names are `basefs.<token>.<what>`, the token a session's own, so that nothing of an earlier session is taken for
this one's. `<what>` is one of `keeper_session_store.PARTS`, the number of a held fd, or `c<n>`: our end of the keeper
socket of the serving server. What that server says after its keeper died waits in it for the next one.

The notes are a memfd in the store: a slot of 1 KiB for each held fd with its number, its text and a checksum. The
slot is written before the fd is put there, and cleared after it was removed, so a keeper that dies in between leaves
a slot without an fd or an fd without a slot, and both are dropped.
"""

import logging
import os
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from basefs.service_manager import tell_systemd

log = logging.getLogger("basefs.keeper")

PREFIX = "basefs."
CHANNEL = "c"
HELD_MAX = 4000
"""The unit's FileDescriptorStoreMax= (4096) less some. systemd passes all names in one variable of the environment, of
128 KiB at most, and compares each new fd with all that it has."""
SLOT_BYTES = 1024
_SLOT = struct.Struct("<QII")
"""Number of the held fd, length of the text, crc32 of both and the text."""
TEXT_BYTES_MAX = SLOT_BYTES - _SLOT.size


class FdStore:
    """The names of one session in the service manager's fd store; without a service manager nothing is stored."""

    def __init__(self, token: str | None = None) -> None:
        self.token = os.urandom(3).hex() if token is None else token

    def put(self, what: str, fd: int) -> bool:
        """Store a copy of the fd; whether it was sent. That the unit allows it cannot be told from here."""
        # Polled, systemd would wake up at every request of the kernel to /dev/fuse.
        return tell_systemd(f"FDSTORE=1\nFDNAME={self.name(what)}\nFDPOLL=0", [fd])

    def remove(self, what: str) -> None:
        """Have the copy closed."""
        remove_stored(self.name(what))

    def name(self, what: str) -> str:
        """What systemd calls it."""
        return f"{PREFIX}{self.token}.{what}"


def remove_stored(name: str) -> None:
    """Have systemd close what is stored under the name."""
    tell_systemd(f"FDSTOREREMOVE=1\nFDNAME={name}")


class Note(NamedTuple):
    """One slot: the number of a held fd and the text that `HeldFds` keeps with it."""

    number: int
    slot: int
    text: bytes


class HeldNotes:
    """Held fds in the fd store, with their notes (keeper_held.Keep). `fd` is the memfd, to be stored by its owner."""

    def __init__(self, store: FdStore, fd: int | None = None) -> None:
        self._store = store
        self.fd = os.memfd_create("basefs-notes", os.MFD_CLOEXEC) if fd is None else fd
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._slots_used = 0
        self._next_number = 1
        self._channels_put = 0
        self._was_told = False

    def put(self, key_and_note: bytes, fd: int) -> int | None:
        """Store the fd and its note; None when that is refused, which is logged once."""
        if len(self._slots) >= HELD_MAX or len(key_and_note) > TEXT_BYTES_MAX:
            self._tell_once(f"more than {HELD_MAX} fds or {TEXT_BYTES_MAX} bytes of a note")
            return None
        number, slot = self._next_number, self._free.pop() if self._free else self._slots_used
        self._next_number += 1
        self._slots_used = max(self._slots_used, slot + 1)
        self._slots[number] = slot
        try:
            os.pwrite(self.fd, _packed(number, key_and_note), slot * SLOT_BYTES)
        except OSError as exc:
            self.forget(number)
            self._tell_once(str(exc.strerror))
            return None
        if not self._store.put(str(number), fd):
            self.forget(number)
            self._tell_once("the service manager does not take it")
            return None
        return number

    def forget(self, number: int) -> None:
        """Have the stored copy closed, and clear its slot."""
        self._store.remove(str(number))
        slot = self._slots.pop(number)
        # A number whose slot is not cleared has no fd, and is dropped by the next keeper.
        self._free.append(slot)
        try:
            os.pwrite(self.fd, bytes(_SLOT.size), slot * SLOT_BYTES)
        except OSError as exc:
            self._tell_once(str(exc.strerror))

    def put_channel(self, fd: int) -> None:
        """See `Keep`. The one before has been read to its end."""
        if self._channels_put:
            self._store.remove(f"{CHANNEL}{self._channels_put}")
        self._channels_put += 1
        self._store.put(f"{CHANNEL}{self._channels_put}", fd)

    def forget_channel(self) -> None:
        """The session is over."""
        if self._channels_put:
            self._store.remove(f"{CHANNEL}{self._channels_put}")

    def restore_channels(self, numbers: Sequence[int]) -> None:
        """Numbers of an earlier keeper's channels, which are not used again."""
        self._channels_put = max(numbers, default=0)

    def restore(self) -> list[Note]:
        """The notes of an earlier keeper, in the order of their numbers; damaged ones are passed over."""
        size_bytes = min(os.fstat(self.fd).st_size, (HELD_MAX + 1) * SLOT_BYTES)
        self._slots_used = -(-size_bytes // SLOT_BYTES)
        notes = []
        for slot in range(self._slots_used):
            note = _unpacked(slot, os.pread(self.fd, SLOT_BYTES, slot * SLOT_BYTES))
            if note is None:
                self._free.append(slot)
            else:
                notes.append(note)
        notes.sort(key=lambda note: note.number)
        self._slots = {note.number: note.slot for note in notes}
        self._next_number = notes[-1].number + 1 if notes else 1
        return notes

    def _tell_once(self, why: str) -> None:
        if not self._was_told:
            self._was_told = True
            log.warning("a file that is open would not outlive the keeper: %s", why)


def _packed(number: int, text: bytes) -> bytes:
    return _SLOT.pack(number, len(text), _checksum(number, text)) + text


def _unpacked(slot: int, data: bytes) -> Note | None:
    if len(data) < _SLOT.size:
        return None
    number, length, checksum = _SLOT.unpack_from(data)
    text = data[_SLOT.size : _SLOT.size + length]
    if number == 0 or len(text) != length or _checksum(number, text) != checksum:
        return None
    return Note(number, slot, text)


def _checksum(number: int, text: bytes) -> int:
    return zlib.crc32(struct.pack("<QI", number, len(text)) + text)

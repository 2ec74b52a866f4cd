"""How many handles the kernel has on each image, and which of them were unlinked: in memory that outlives the server.

A memfd in escrow, changed in place by plain stores: 64 bytes of header, then slots of four words (image number,
handles of guests, other handles, flags). Number 0 is a free slot.

What a server was killed over: an open or a release is counted just before it is answered, with nothing awaited
between the two, so at most one is counted and not answered. The header says which one, and the count it leads to; it
is wiped once the answer has left. The next server sets that count, and does not count that request again when the
kernel sends it again. A thread that waits in open(2) cannot open anything else, so it is known by its id; a release is
known by its handle. In the microseconds between the answer and the wiping the choice is one handle too many for a
release (bytes stay too long), and for an open by the same thread one too few, which the next read puts right.
"""

import mmap
import os
from collections.abc import Callable

MAGIC = 0x0BA5EF50
VERSION = 1
SLOTS = 16_384
"""Images open at a time; of more the next server learns when they are read."""
RESENT_WITHIN_S = 10.0
"""The kernel hands out first what it sends again, so later requests are new ones."""
KEY = "opens"

_HEADER_WORDS = 16
_SLOT_WORDS = 4
_BYTES = 4 * (_HEADER_WORDS + SLOTS * _SLOT_WORDS)
_MAGIC, _VERSION, _KIND, _NUMBER, _IS_GUEST, _THREAD, _COUNT = range(7)
_OPEN, _RELEASE = 1, 2
_GUEST, _OTHER, _FLAGS = 1, 2, 3
_UNLINKED = 1

Pending = tuple[int, int, int, int]


def new_table() -> int:
    """The fd of an empty table."""
    fd = os.memfd_create("basefs-opens", os.MFD_CLOEXEC)
    os.ftruncate(fd, _BYTES)
    os.pwrite(fd, MAGIC.to_bytes(4, "little") + VERSION.to_bytes(4, "little"), 0)
    return fd


class OpenTable:
    """The table behind `fd`, which stays the caller's. Owned by the trio loop; nothing here awaits."""

    def __init__(self, fd: int, clock: Callable[[], float], after_answer: Callable[[Callable[[], None]], None]) -> None:
        """`after_answer(fn)` calls `fn` once the request at work has been answered.

        Raises:
            ValueError: `fd` is no table of ours.
        """
        if os.fstat(fd).st_size != _BYTES:
            raise ValueError("it has another size")
        self._words = memoryview(mmap.mmap(fd, _BYTES)).cast("I")
        if (self._words[_MAGIC], self._words[_VERSION]) != (MAGIC, VERSION):
            raise ValueError("it is of another kind or version")
        self._after_answer = after_answer
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        for slot in range(_HEADER_WORDS + (SLOTS - 1) * _SLOT_WORDS, _HEADER_WORDS - 1, -_SLOT_WORDS):
            number = self._words[slot]
            if number:
                self._slots[number] = slot
            else:
                self._free.append(slot)
        self._clock = clock
        self._resent = self._finish()
        self._resent_until = clock() + RESENT_WITHIN_S

    # --- what is open ---------------------------------------------------------------------------------

    def handles(self, number: int) -> int:
        """Handles on the image."""
        return self._count(number, _GUEST) + self._count(number, _OTHER)

    def has(self, number: int, *, is_guest: bool) -> bool:
        """Whether the image has a handle of that kind."""
        return self._count(number, _GUEST if is_guest else _OTHER) > 0

    def all_handles(self) -> dict[int, int]:
        """Handles by image number, of images that have some."""
        return {number: count for number in self._slots if (count := self.handles(number))}

    def unlinked(self) -> set[int]:
        """Images that were unlinked and not opened since."""
        return {number for number, slot in self._slots.items() if self._words[slot + _FLAGS] & _UNLINKED}

    # --- what changes it ------------------------------------------------------------------------------

    def opened(self, number: int, *, is_guest: bool, thread_id: int) -> bool:
        """Count a handle that is answered next. It ends the image's being unlinked.

        False: it was counted before the server was killed over it.
        """
        if self._is_resent((_OPEN, number, int(is_guest), thread_id)):
            return False
        field = _GUEST if is_guest else _OTHER
        self._set(number, field, self._count(number, field) + 1, _OPEN, thread_id)
        return True

    def released(self, number: int, *, is_guest: bool) -> bool:
        """Count a handle off that is answered next; False: there is none, or it was counted off before a kill."""
        field = _GUEST if is_guest else _OTHER
        if self._is_resent((_RELEASE, number, int(is_guest), 0)) or not self._count(number, field):
            return False
        self._set(number, field, self._count(number, field) - 1, _RELEASE, 0)
        return True

    def learned(self, number: int, *, is_guest: bool) -> None:
        """Count a handle that nothing is known of, but is read from."""
        self._store(number, _GUEST if is_guest else _OTHER, 1)

    def set_unlinked(self, number: int, *, is_unlinked: bool) -> None:
        """Note that the image's bytes are to go at the last close, or not any more."""
        if is_unlinked or number in self._slots:
            self._store(number, _FLAGS, _UNLINKED if is_unlinked else 0)

    # --- the words --------------------------------------------------------------------------------------

    def _count(self, number: int, field: int) -> int:
        slot = self._slots.get(number)
        return 0 if slot is None else self._words[slot + field]

    def _set(self, number: int, field: int, count: int, kind: int, thread_id: int) -> None:
        words = self._words
        words[_KIND] = 0
        words[_NUMBER], words[_IS_GUEST], words[_THREAD], words[_COUNT] = number, field == _GUEST, thread_id, count
        words[_KIND] = kind
        self._apply(number, field, count, kind)
        self._after_answer(self._wipe)

    def _apply(self, number: int, field: int, count: int, kind: int) -> None:
        if kind == _OPEN:
            self._store(number, _FLAGS, 0)
        self._store(number, field, count)

    def _store(self, number: int, field: int, value: int) -> None:
        slot = self._slots.get(number)
        if slot is None:
            if not value or not self._free:
                return
            slot = self._slots[number] = self._free.pop()
            # The number last: a slot that has one is whole.
            self._words[slot + field] = value
            self._words[slot] = number
            return
        self._words[slot + field] = value
        if not any(self._words[slot + other] for other in (_GUEST, _OTHER, _FLAGS)):
            self._words[slot] = 0
            del self._slots[number]
            self._free.append(slot)

    def _wipe(self) -> None:
        self._words[_KIND] = 0

    def _finish(self) -> Pending | None:
        """Do what a killed server was about to do; what the kernel may send again for that."""
        words = self._words
        kind = words[_KIND]
        if not kind:
            return None
        number, is_guest = words[_NUMBER], words[_IS_GUEST]
        self._apply(number, _GUEST if is_guest else _OTHER, words[_COUNT], kind)
        pending = (kind, number, is_guest, words[_THREAD])
        self._wipe()
        return pending

    def _is_resent(self, request: Pending) -> bool:
        if self._resent is None:
            return False
        if self._clock() > self._resent_until:
            self._resent = None
            return False
        if request != self._resent:
            return False
        self._resent = None
        return True

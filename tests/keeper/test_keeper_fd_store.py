"""Held fds and their notes, as the next keeper finds them."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from basefs.keeper_fd_store import SLOT_BYTES, FdStore, HeldNotes
from basefs.keeper_held import KEY_AND_NOTE_BYTES_MAX
from basefs.keeper_saved_session import SavedSession
from basefs.mounts import Mount

ENTRY = Mount(
    mount_id=7,
    major=0,
    minor=44,
    mountpoint="/a b",
    options="rw",
    fstype="fuse.basefs",
    source="basefs",
    super_options="rw",
)
SESSION = SavedSession(
    mountpoint="/a b", cache_dir="/c", entry=ENTRY, init_request=bytes(range(104)), fixed={"view": "raw"}
)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


def heard(manager: socket.socket) -> str:
    data, fds, _, _ = socket.recv_fds(manager, 4096, 4)
    for fd in fds:
        os.close(fd)
    return f"{data.decode()} +{len(fds)}"


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("held")
    yield fd
    os.close(fd)


def test_a_held_fd_is_stored_under_a_number_and_removed_by_it(manager: socket.socket, fd: int) -> None:
    notes = HeldNotes(FdStore("abc"))
    number = notes.put(b'["k",1]', fd)
    assert heard(manager) == "FDSTORE=1\nFDNAME=basefs.abc.1\nFDPOLL=0 +1"
    assert number == 1
    notes.forget(number)
    assert heard(manager) == "FDSTOREREMOVE=1\nFDNAME=basefs.abc.1 +0"
    os.close(notes.fd)


def test_the_next_keeper_finds_the_notes_in_order_and_gives_new_numbers(manager: socket.socket, fd: int) -> None:
    notes = HeldNotes(FdStore("abc"))
    texts = [b'["%d",null]' % number for number in range(4)]
    for text in texts:
        notes.put(text, fd)
    notes.forget(2)
    notes.put(b"x" * KEY_AND_NOTE_BYTES_MAX, fd)  # takes the slot that is free
    assert os.fstat(notes.fd).st_size <= 4 * SLOT_BYTES
    again = HeldNotes(FdStore("abc"), notes.fd)
    found = again.restore()
    assert [(note.number, note.text) for note in found] == [
        (1, texts[0]),
        (3, texts[2]),
        (4, texts[3]),
        (5, b"x" * KEY_AND_NOTE_BYTES_MAX),
    ]
    assert again.put(b"new", fd) == 6
    os.close(notes.fd)


@pytest.mark.parametrize("byte", [0, 9, 13, 20])
def test_a_damaged_note_is_passed_over(manager: socket.socket, fd: int, byte: int) -> None:
    notes = HeldNotes(FdStore("abc"))
    notes.put(b'["a",null]', fd)
    notes.put(b'["b",null]', fd)
    os.pwrite(notes.fd, bytes([os.pread(notes.fd, 1, byte)[0] ^ 1]), byte)
    assert [note.text for note in HeldNotes(FdStore("abc"), notes.fd).restore()] == [b'["b",null]']
    os.close(notes.fd)


def test_without_a_service_manager_nothing_is_kept(
    fd: int, monkeypatch: pytest.MonkeyPatch, expected_warnings: object
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    expected_warnings("would not outlive the keeper: the service manager does not take it")  # type: ignore[operator]
    notes = HeldNotes(FdStore("abc"))
    assert notes.put(b'["a",null]', fd) is None
    assert notes.put(b'["a",null]', fd) is None
    os.close(notes.fd)


def test_a_session_is_saved_and_read_again() -> None:
    fd = SESSION.to_memfd()
    assert SavedSession.from_memfd(fd) == SESSION
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    os.close(fd)


@pytest.mark.parametrize("position", [0, 7, 8, 100, 300])
def test_a_session_with_any_byte_damaged_is_refused(position: int) -> None:
    fd = SESSION.to_memfd()
    data = bytearray(os.pread(fd, 100_000, 0))
    os.close(fd)
    data[position] ^= 4
    damaged = os.memfd_create("damaged")
    os.write(damaged, data)
    with pytest.raises(ValueError, match="checksum"):
        SavedSession.from_memfd(damaged)
    os.close(damaged)


@pytest.mark.parametrize("content", [b"", b"00000000", b"no session at all"])
def test_what_is_no_session_is_refused(content: bytes) -> None:
    fd = os.memfd_create("other")
    os.write(fd, content)
    with pytest.raises(ValueError):
        SavedSession.from_memfd(fd)
    os.close(fd)

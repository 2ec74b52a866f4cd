"""Images in files that are on this host, too: `file://` locations of Glance's file store, on NFS, CephFS or the like.

A location is data from users. It is opened name by name from a directory that the operator allows, and no name of it
is a link, `..`, or anything but a plain file. Functions block: for threads.
"""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from basefs import errors

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
_REFUSED = (errno.EACCES, errno.EPERM)
_SCHEMES = ("file://", "filesystem://")


class FileLocations:
    """Which files are read in place. `any_name`: also those that are not called by the id of their image."""

    def __init__(self, directories: Sequence[Path], *, any_name: bool) -> None:
        self._directories = tuple(directories)
        self._any_name = any_name

    def refusal(self, image_id: str, location: str) -> str | None:
        """Why the location is not to be opened for that image; None: `open` may be tried. Asks nobody."""
        path = _path_of(location)
        if path is None:
            return "it names no file by its absolute path"
        names = path.split("/")[1:]
        if any(name in ("", ".", "..") for name in names):
            return "its path holds . or .. or nothing between two slashes"
        if self._directory_of(path) is None:
            return "it is not below [file_location] directories"
        if names[-1] != image_id and not self._any_name:
            return "its name is not the image's id, as Glance's file store has it ([file_location] any_name)"
        return None

    def open(self, location: str, *, size: int) -> int:
        """An fd for reading the file at a location that `refusal` allows.

        Raises:
            StoreGoneError: there is no such file, or no plain one, or a link is on the way.
            SourceForbiddenError: we may not read it.
            SourceUnavailableError: its file system failed.
            SourceCorruptError: it has another size.
        """
        path = _path_of(location)
        directory = None if path is None else self._directory_of(path)
        assert path is not None, "refused before"
        assert directory is not None, "refused before"
        try:
            fd = _opened_beneath(directory, Path(path).relative_to(directory).parts)
        except OSError as exc:
            text = f"the file cannot be opened: {exc.strerror}"
            if exc.errno in _GONE:
                raise errors.StoreGoneError(text) from exc
            if exc.errno in _REFUSED:
                raise errors.SourceForbiddenError(text) from exc
            raise errors.SourceUnavailableError(text) from exc
        found = os.fstat(fd).st_size
        if found != size:
            os.close(fd)
            raise errors.SourceCorruptError(f"the file has {found} bytes, the image's metadata say {size}")
        return fd

    def _directory_of(self, path: str) -> Path | None:
        parents = Path(path).parents
        return next((one for one in self._directories if one in parents), None)


def _path_of(location: str) -> str | None:
    """The path, as Glance's file store takes it from a location: as it stands, nothing is decoded."""
    scheme = next((one for one in _SCHEMES if location.startswith(one)), None)
    path = "" if scheme is None else location.removeprefix(scheme)
    try:
        is_path = path.startswith("/") and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # half of a character: JSON may hold that
        return None
    return path if is_path else None


def _opened_beneath(directory: Path, names: Sequence[str]) -> int:
    """An fd for reading a plain file, by names of which none is a link. OSError: there is none.

    What a name is, is seen before it is opened for reading: opening a device or a FIFO may do something.
    """
    at = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for index, name in enumerate(names):
            kind = os.O_DIRECTORY if index < len(names) - 1 else 0
            below = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=at)
            os.close(at)
            at = below
        if not stat.S_ISREG(os.fstat(at).st_mode):
            raise OSError(errno.ELOOP, "it is a link, or no plain file")
        return os.open(f"/proc/self/fd/{at}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(at)

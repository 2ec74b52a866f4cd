"""What other users may do on the mount: what they might do in the directory beneath it."""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.mount.lower_mount import LowerMount, LowerSubdirectory

pytestmark = pytest.mark.mount

USER, GROUP, OTHER_GROUP = 12345, 23456, 34567


@pytest.fixture(scope="module")
def whole_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LowerMount]:
    """One mount for the tests of this file."""
    with LowerMount(tmp_path_factory.mktemp("lower") / "base") as mounted:
        yield mounted


@pytest.fixture
def mount(whole_mount: LowerMount, request: pytest.FixtureRequest) -> Iterator[LowerSubdirectory]:
    """A directory that everybody may write to."""
    with LowerSubdirectory(whole_mount, request.node.name) as directory:
        os.chmod(directory.path, 0o777)
        yield directory
    assert whole_mount.forget_all() == [0, 0, 0]


def as_user(
    directory: LowerSubdirectory,
    call: Callable[[], Any],
    uid: int = USER,
    groups: Sequence[int] = (),
    umask: int = 0o022,
) -> Any:
    """What `call` gives in a child process of that user in the directory, or the name of its errno."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # Entered as root: the way to it is root's.
            os.chdir(directory.path)
            os.umask(umask)
            os.setgroups(groups)
            os.setgid(GROUP)
            os.setuid(USER)
            try:
                answer = call()
            except OSError as exc:
                answer = errno.errorcode[exc.errno]
            os.write(writing, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def write_text(name: str, text: str, mode: int = 0o666) -> int:
    with open(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode), "w") as file:
        return file.write(text)


def mode_of(path: Path) -> str:
    return oct(os.lstat(path).st_mode)


def test_new_files_belong_to_their_maker(mount: LowerSubdirectory) -> None:
    def make() -> None:
        write_text("file", "text", 0o666)
        os.mkdir("dir", 0o777)
        os.symlink("goal", "link")
        os.mkfifo("fifo", 0o666)
        os.mknod("node", stat.S_IFREG | 0o666)

    assert as_user(mount, make, umask=0o027) is None
    expected = {"file": 0o100640, "dir": 0o40750, "link": 0o120777, "fifo": 0o10640, "node": 0o100640}
    for name, mode in expected.items():
        status = os.lstat(mount.beneath / name)
        assert (status.st_uid, status.st_gid, oct(status.st_mode)) == (USER, GROUP, oct(mode)), name


def test_file_of_root_is_closed_to_others(mount: LowerSubdirectory) -> None:
    path = mount.path / "secret"
    path.write_text("secret")
    os.chmod(path, 0o600)
    os.setxattr(path, "user.a", b"1")
    for call in (
        lambda: Path("secret").read_text(),
        lambda: write_text("secret", "changed"),
        lambda: os.truncate("secret", 0),
        lambda: os.getxattr("secret", "user.a"),
        lambda: os.setxattr("secret", "user.a", b"2"),
    ):
        assert as_user(mount, call) == "EACCES"
    for call in (
        lambda: os.chmod("secret", 0o666),
        lambda: os.chown("secret", USER, -1),
        lambda: os.utime("secret", ns=(1, 1)),
        lambda: os.link("secret", "mine"),
    ):
        assert as_user(mount, call) in ("EPERM", "EACCES")
    assert path.read_text() == "secret"
    assert as_user(mount, lambda: os.stat("secret").st_size) == 6


def test_access_follows_mode_and_groups(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    path.write_text("text")
    os.chown(path, 0, OTHER_GROUP)
    os.chmod(path, 0o640)
    assert as_user(mount, lambda: Path("file").read_text()) == "EACCES"
    assert as_user(mount, lambda: Path("file").read_text(), groups=[OTHER_GROUP]) == "text"
    assert as_user(mount, lambda: write_text("file", "no"), groups=[OTHER_GROUP]) == "EACCES"
    os.chmod(path, 0o660)
    assert as_user(mount, lambda: write_text("file", "yes"), groups=[OTHER_GROUP]) == 3
    os.chown(path, USER, 0)
    os.chmod(path, 0o400)
    assert as_user(mount, lambda: Path("file").read_text()) == "yes"
    assert as_user(mount, lambda: write_text("file", "no")) == "EACCES"


def test_directory_of_root_takes_no_names_of_others(mount: LowerSubdirectory) -> None:
    (mount.path / "file").touch()
    (mount.path / "dir").mkdir()
    os.chmod(mount.path, 0o755)
    for call in (
        lambda: write_text("new", "text"),
        lambda: os.mkdir("new"),
        lambda: os.symlink("a", "new"),
        lambda: os.unlink("file"),
        lambda: os.rmdir("dir"),
        lambda: os.rename("file", "new"),
    ):
        assert as_user(mount, call) == "EACCES"
    assert sorted(os.listdir(mount.beneath)) == ["dir", "file"]
    os.chmod(mount.path / "dir", 0o700)
    assert as_user(mount, lambda: os.listdir("dir")) == "EACCES"
    assert as_user(mount, lambda: os.stat("dir/x").st_size) == "EACCES"


def test_sticky_directory_protects_files_of_others(mount: LowerSubdirectory) -> None:
    os.chmod(mount.path, 0o1777)
    (mount.path / "roots").touch()
    assert as_user(mount, lambda: os.unlink("roots")) == "EPERM"
    assert as_user(mount, lambda: os.rename("roots", "mine")) == "EPERM"
    assert as_user(mount, lambda: (write_text("own", "text"), os.unlink("own"))[0]) == 4


def test_setgid_directory_hands_down_its_group(mount: LowerSubdirectory) -> None:
    os.chown(mount.path, -1, OTHER_GROUP)
    os.chmod(mount.path, 0o2777)
    assert as_user(mount, lambda: (write_text("file", "text", 0o2775), os.mkdir("dir"))[0]) == 4
    assert os.stat(mount.beneath / "file").st_gid == os.stat(mount.beneath / "dir").st_gid == OTHER_GROUP
    # Not of that group, so without its set-group-id bit.
    assert (mode_of(mount.beneath / "file"), mode_of(mount.beneath / "dir")) == ("0o100755", "0o42755")


def test_owner_cannot_give_a_file_away(mount: LowerSubdirectory) -> None:
    assert as_user(mount, lambda: write_text("file", "text")) == 4
    assert as_user(mount, lambda: os.chown("file", 0, -1)) == "EPERM"
    assert as_user(mount, lambda: os.chown("file", -1, OTHER_GROUP)) == "EPERM"
    assert as_user(mount, lambda: os.chown("file", -1, OTHER_GROUP), groups=[OTHER_GROUP]) is None
    assert os.stat(mount.beneath / "file").st_gid == OTHER_GROUP
    assert as_user(mount, lambda: os.chmod("file", 0o2755)) is None
    assert mode_of(mount.beneath / "file") == "0o100755"


@pytest.mark.parametrize("change", ["write", "append", "truncate", "open", "ftruncate", "chown"])
def test_changing_a_file_takes_its_set_id_bits(mount: LowerSubdirectory, change: str) -> None:
    def do() -> None:
        if change == "append":
            fd = os.open("file", os.O_WRONLY | os.O_APPEND)
        elif change in ("write", "ftruncate"):
            fd = os.open("file", os.O_WRONLY)
        if change in ("write", "append"):
            os.write(fd, b"other")
        elif change == "ftruncate":
            os.ftruncate(fd, 1)
        elif change == "truncate":
            os.truncate("file", 1)
        elif change == "open":
            os.open("file", os.O_WRONLY | os.O_TRUNC)
        elif change == "chown":
            os.chown("file", -1, OTHER_GROUP)

    path = mount.path / "file"
    path.write_text("text")
    os.chown(path, USER, GROUP)
    os.chmod(path, 0o6755)
    assert mode_of(path) == "0o106755"
    assert as_user(mount, do, groups=[OTHER_GROUP]) is None
    assert mode_of(mount.beneath / "file") == "0o100755"


def test_trusted_attributes_are_for_root_only(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    path.touch()
    os.chmod(path, 0o666)
    os.setxattr(path, "trusted.a", b"1")
    os.setxattr(path, "user.a", b"1")
    assert as_user(mount, lambda: os.listxattr("file")) == ["user.a"]
    assert as_user(mount, lambda: os.getxattr("file", "trusted.a")) == "ENODATA"
    assert as_user(mount, lambda: os.setxattr("file", "trusted.a", b"2")) == "EPERM"


def test_nothing_on_the_mount_is_executed(mount: LowerSubdirectory) -> None:
    (mount.path / "program").write_text("#!/bin/sh\n")
    os.chmod(mount.path / "program", 0o755)
    assert as_user(mount, lambda: os.execv("./program", ["program"])) == "EACCES"

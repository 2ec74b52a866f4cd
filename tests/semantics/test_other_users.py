"""What another user of the node can do with basefs: see the mount as its modes say, and nothing else."""

import os
import pwd
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.semantics.conftest import eventually
from tools.mount import BasefsMount, MountError
from tools.rig import Rig

pytestmark = pytest.mark.mount
OTHER = "nobody"


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that everybody may enter: pytest's own are closed, and would keep others out by themselves."""
    with tempfile.TemporaryDirectory(prefix="basefs-access-") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@pytest.fixture(params=[0o000, 0o077], ids=["umask 0", "umask 077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def denied(call: Callable[[], object]) -> bool:
    """Whether another user gets EACCES from `call`, made in a child process; any other failure is none."""
    user = pwd.getpwnam(OTHER)
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.chdir("/")
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            call()
            code = 0
        except PermissionError:
            code = 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 1), code
    return code == 1


def connect(path: Path, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as client:
        client.connect(str(path))


def test_sockets_and_cache_refuse_other_users_whatever_umask_and_modes_there_were(
    umask: int, open_directory: Path, rig: Rig
) -> None:
    """[S1702] Other users can neither use basefs' sockets nor look into `cache_dir`, whatever umask basefs was started
    with and whatever mode the directory had.
    """
    mount = BasefsMount(open_directory, rig.conf_lines())
    for path in (open_directory, mount.instances_path, mount.mountpoint):
        os.chmod(path, 0o755)
    os.chmod(mount.cache_dir, 0o777)
    image_id = rig.upload(os.urandom(200_000), "access", "raw")
    with mount:
        assert len(mount.path(image_id).read_bytes()) == 200_000
        eventually(lambda: (mount.cache_dir / "state.sqlite-wal").exists() or (mount.cache_dir / "chunks").exists())
        sockets = [path for path in open_directory.iterdir() if stat.S_ISSOCK(path.stat().st_mode)]
        assert sockets
        for path in sockets:
            assert path.stat().st_mode & 0o077 == 0, path
            for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
                assert denied(lambda path=path, kind=kind: connect(path, kind)), path
        assert mount.cache_dir.stat().st_mode & 0o777 == 0o700
        assert denied(lambda: os.listdir(mount.cache_dir))
        files = [path for path in mount.cache_dir.rglob("*") if not path.is_symlink()]
        assert {"lock", "state.sqlite", "chunks"} <= {path.name for path in files}
        for path in files:
            assert path.stat().st_mode & 0o077 == 0, path
            assert denied(path.read_bytes), path
        # The image itself is what its mode says: nova's, qemu's and everybody's to read.
        assert not denied(mount.path(image_id).read_bytes)


def test_a_cache_directory_of_another_user_is_refused(open_directory: Path, rig: Rig) -> None:
    """[S1703] A `cache_dir` that belongs to another user is refused, and nothing is mounted."""
    mount = BasefsMount(open_directory, rig.conf_lines())
    os.chown(mount.cache_dir, 65534, -1)
    with pytest.raises(MountError, match="belongs to uid 65534, not to uid 0: chown it"):
        mount.start()
    assert not mount.is_mounted


def test_what_another_user_made_under_the_name_of_the_control_socket_is_not_used(
    open_directory: Path, rig: Rig
) -> None:
    """[S1704] A socket of somebody else under the name of `control_socket` is not used, and nothing is mounted."""
    mount = BasefsMount(open_directory, rig.conf_lines())
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(open_directory / "control.sock"))
        os.chown(open_directory / "control.sock", 65534, -1)
        other.listen()
        with pytest.raises(MountError, match="another basefs answers on the control socket"):
            mount.start()

"""Helper processes: what they answer, and that they end, whatever they do."""

import os
import signal
import sys
from pathlib import Path

import pytest
import trio

from basefs import errors
from basefs.volumes import brick as brick_module
from basefs.volumes.brick import HELPER_COMMAND, Brick
from basefs.volumes.connection import read_connection, sealed_connection

SECRET = "hunter2-of-chap"


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    path.write_bytes(bytes(range(256)) * 16)
    return path


@pytest.fixture
def connection_fd(device):
    fd = sealed_connection({"driver_volume_type": "local", "device_path": str(device), "format": "raw"})
    yield fd
    os.close(fd)


def helpers() -> list[int]:
    """Those that are our children, dead ones that nobody waited for too; the rigs of the session are others."""
    children = [(pid, text_of(Path(f"/proc/{pid}/cmdline"))) for pid in children_of(os.getpid())]
    return [pid for pid, command in children if not command or "helper" in command]


def children_of(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in text_of(task / "children").split()]


def text_of(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def opened_by(pid: int) -> list[str]:
    return sorted(os.readlink(fd).partition(":")[0] for fd in Path(f"/proc/{pid}/fd").iterdir())


async def test_a_helper_answers_one_request_after_the_other_and_is_used_again(brick, connection_fd, device):
    pids = set()
    for _ in range(3):
        async with brick.helper() as helper:
            pids.add(helper.process.pid)
            assert (await helper.properties(host="node", towards="localhost"))["host"] == "node"
            found = await helper.connect(connection_fd, 60)
            assert found.bytes.read(0, 4096) == device.read_bytes()
            assert not os.get_inheritable(found.bytes.fd_to_hold())
            assert read_connection(found.connection_fd)[1] == {"type": "local", "path": str(device)}
            assert await helper.disconnect(found.connection_fd, may_be_shared=False) == []
            found.bytes.close()
            os.close(found.connection_fd)
    assert len(pids) == 1


async def test_a_helper_without_work_ends(monkeypatch, brick):
    monkeypatch.setattr(brick_module, "HELPER_IDLE_S", 0.05)
    async with brick.helper() as helper:
        await helper.properties(host="node", towards="localhost")
    with trio.fail_after(60):
        await helper.process.wait()


async def test_idle_helpers_end_with_the_service(tmp_path, behaviour):
    async with trio.open_nursery() as service:
        brick = Brick(nursery=service, helpers_max=2, lock_path=tmp_path, is_multipath=False, command=behaviour.command)
        async with brick.helper() as helper:
            await helper.properties(host="node", towards="localhost")
        service.cancel_scope.cancel()
    assert helpers() == []


@pytest.mark.parametrize(
    ("word", "text", "limit_s"),
    [
        ("hang", "no answer within", 0.2),
        ("late", "no answer within", 0.2),
        ("die", "the helper process ended", 60),
        ("error", "told to fail", 60),
        ("garbage", "cannot be understood", 60),
        ("unasked", "sent no device", 60),
    ],
)
async def test_whatever_a_helper_does_it_is_an_error_and_it_ends(brick, behaviour, connection_fd, word, text, limit_s):
    behaviour.is_to(connect=word)
    with pytest.raises(errors.VolumeError, match=text):
        async with brick.helper() as helper:
            await helper.connect(connection_fd, limit_s)
    assert helpers() == []
    behaviour.is_to()
    async with brick.helper() as helper:
        found = await helper.connect(connection_fd, 60)
    found.bytes.close()
    os.close(found.connection_fd)


async def test_a_helper_that_died_while_idle_is_not_used(brick, connection_fd):
    async with brick.helper() as helper:
        await helper.properties(host="node", towards="localhost")
    os.kill(helper.process.pid, signal.SIGKILL)
    await helper.process.wait()
    async with brick.helper() as other:
        await other.properties(host="node", towards="localhost")
    assert other is not helper


async def test_cancellation_ends_the_helper(brick, behaviour, connection_fd):
    behaviour.is_to(connect="hang")
    with trio.move_on_after(0.2) as limit:
        async with brick.helper() as helper:
            await helper.connect(connection_fd, 60)
    assert limit.cancelled_caught
    assert helpers() == []


async def test_a_helper_that_cannot_be_started_is_an_error(tmp_path, nursery):
    brick = Brick(nursery=nursery, helpers_max=1, lock_path=tmp_path, is_multipath=False, command=("/nowhere/python",))
    with pytest.raises(errors.VolumeError, match="cannot be started: No such file"):
        async with brick.helper():
            pass


async def test_a_helper_has_no_fd_of_ours_but_its_socket(brick, tmp_path):
    ours = os.open(tmp_path, os.O_RDONLY)
    async with brick.helper() as helper:
        await helper.properties(host="node", towards="localhost")
        assert opened_by(helper.process.pid) == ["/dev/null", "/dev/null", "pipe", "socket"]
    os.close(ours)


# -- with os-brick itself, in one helper


@pytest.fixture
def real_brick(tmp_path, nursery):
    return Brick(nursery=nursery, helpers_max=1, lock_path=tmp_path / "locks", is_multipath=False)


async def test_os_brick_connects_and_what_it_says_is_no_secret(real_brick, connection_fd, device, caplog):
    caplog.set_level("DEBUG")
    iscsi = sealed_connection(
        {
            "driver_volume_type": "iscsi",
            "target_portal": "127.0.0.1:1",
            "target_iqn": "iqn.2026-11.x:y",
            "target_lun": 1,
            "auth_method": "CHAP",
            "auth_username": "user",
            "auth_password": SECRET,
        }
    )
    formats = sealed_connection({"driver_volume_type": "local", "device_path": str(device), "format": "qcow2"})
    async with real_brick.helper() as helper:
        assert (await helper.properties(host="node-a", towards="localhost"))["host"] == "node-a"
        about = [text_of(Path(f"/proc/{helper.process.pid}") / name) for name in ("cmdline", "environ")]
        found = await helper.connect(connection_fd, 60)
        assert found.bytes.read(0, 16) == device.read_bytes()[:16]
        with pytest.raises(errors.NoVolumeError, match="format qcow2, not raw"):
            await helper.connect(formats, 60)
        with pytest.raises(errors.VolumeError) as failed:
            await helper.connect(iscsi, 60)
        assert await helper.disconnect(found.connection_fd, may_be_shared=False) == []
    os.close(iscsi)
    os.close(formats)
    found.bytes.close()
    os.close(found.connection_fd)
    assert SECRET not in str(failed.value) + caplog.text
    assert SECRET not in "".join(about)


async def test_helpers_end_when_their_server_is_killed(tmp_path):
    server = (
        "import socket, subprocess, sys, time\n"
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"subprocess.Popen([*{HELPER_COMMAND!r}, str(b.fileno()), {str(tmp_path)!r}], pass_fds=[b.fileno()],"
        " start_new_session=True)\n"
        'b.close(); a.send(b\'{"do": "properties", "host": "a", "towards": "localhost", "multipath": false}\')\n'
        "a.recv(65536); print('ready', flush=True); time.sleep(3600)\n"
    )
    process = await trio.lowlevel.open_process(
        [sys.executable, "-P", "-c", server], stdout=-1, stderr=-3, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    await process.stdout.receive_some()
    (child,) = children_of(process.pid)
    ended = os.pidfd_open(child)
    process.kill()
    await process.wait()
    with trio.fail_after(60):
        await trio.lowlevel.wait_readable(ended)
    os.close(ended)
    await process.stdout.aclose()

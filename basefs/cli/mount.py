"""`basefs mount`: check the configuration, then become the keeper, or start one and wait until it serves."""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from basefs.cli.common import BasefsCommand
from basefs.errors import ConfigError, MountError
from basefs.keeper_spec import KeeperSpec, command_line

START_DEADLINE_S = 60.0
ANSWER_SLACK_S = 15.0
"""What a keeper may take beyond its server's deadline to take everything back and say why."""
ANSWER_BYTES_MAX = 65536


class Mount(BasefsCommand):
    """Mount basefs over nova's _base and serve it."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """See cliff."""
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--background",
            action="store_true",
            help="return as soon as the mount serves, or with the error (default: stay in the foreground, as "
            "systemd's Type=notify wants it)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:  # noqa: RET503  # execv does not return
        """Returns with `--background` only."""
        from basefs.config import load_mount_settings

        options = self.app.options
        if parsed_args.background:
            conf, settings = load_mount_settings(options.config_file, options.config_dir)
        else:
            conf, settings = self.app.load()
        spec = KeeperSpec(
            mountpoint=str(settings.mountpoint),
            cache_dir=str(settings.cache_dir),
            config_files=[_absolute(path) for path in options.config_file],
            config_dirs=[_absolute(path) for path in options.config_dir],
            view=settings.view,
            control_socket=str(settings.control_socket),
            read_ahead_kib=settings.read_ahead_bytes // 1024,
            max_background=settings.max_background,
            start_deadline_s=START_DEADLINE_S,
            watchdog_s=settings.watchdog_s,
            upgrade_deadline_s=settings.upgrade_deadline_s,
        )
        if parsed_args.background:
            from basefs.observability import log_file_of

            return _mount_in_background(spec, log_file_of(conf))
        sys.stdout.flush()
        command = command_line(spec)
        os.execv(command[0], command)  # noqa: S606  # we become the keeper: the process that systemd watches


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _mount_in_background(spec: KeeperSpec, log_file: Path | None) -> int:
    """Start a keeper in a session of its own, and wait for its word.

    Raises:
        MountError: It did not come to serve.
    """
    read_fd, write_fd = os.pipe()
    log_fd = _open_log(log_file)
    try:
        command = command_line(spec._replace(ready_fd=write_fd))
        keeper = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=[write_fd],
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(write_fd)
        os.close(log_fd)
    try:
        answer = _wait_for_answer(read_fd, spec.start_deadline_s + ANSWER_SLACK_S)
    except KeyboardInterrupt:
        keeper.send_signal(signal.SIGTERM)
        raise
    finally:
        os.close(read_fd)
    if answer is not None and answer.get("ready") is True:
        return 0
    where = f"; see {log_file}" if log_file is not None else ""
    if answer is not None:
        keeper.wait()
        raise MountError(str(answer.get("error")))
    keeper.send_signal(signal.SIGTERM)
    raise MountError(f"the keeper (pid {keeper.pid}) ended or hung without saying why{where}")


def _open_log(log_file: Path | None) -> int:
    """What keeper and server write outside their logs: the log file, or nowhere."""
    if log_file is None:
        return os.open(os.devnull, os.O_WRONLY)
    try:
        return os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as exc:
        raise ConfigError(f"[DEFAULT] log_file {log_file}: {exc.strerror}") from None


def _wait_for_answer(fd: int, limit_s: float) -> dict[str, object] | None:
    """What the keeper wrote; None when it said nothing within the limit, or closed the pipe."""
    end = time.monotonic() + limit_s
    data = b""
    while (rest_s := end - time.monotonic()) > 0:
        if not select.select([fd], [], [], rest_s)[0]:
            break
        piece = os.read(fd, ANSWER_BYTES_MAX)
        if not piece:
            break
        data += piece
    try:
        answer = json.loads(data)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None

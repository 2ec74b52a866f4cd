"""A nova-compute without libvirt, database and message queue: nova's own code, one JSON command a line.

Run by the interpreter of a venv that holds nova (and not by the project's): ``nova_driver.py [--user NAME]``.
Standard input takes ``{"command": name, ...arguments}``, a line each; standard output answers each with one line:

* ``ok`` and either ``result`` or ``error``, ``message`` and ``traceback``;
* ``log``: what nova logged at INFO and above, as ``{"level", "logger", "message"}``;
* ``commands``: the command lines nova ran (qemu-img, mkfs ...);
* ``glance_requests``: ``"METHOD path"`` of every request nova's Glance client sent;
* ``opens``: files under instances_path which nova's own process opened, renamed or removed, as ``[event, path]``;
* ``seconds``.

With ``--user`` the process is what nova-compute is on a compute node: that user's uid, with a privsep daemon of root's
beside it. CAP_DAC_READ_SEARCH stays, because the interpreter and the test's folders may lie below folders of root's;
it opens nothing for writing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import pwd
import re
import sys
import time
import traceback
from typing import Any, TextIO

_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_DAC_READ_SEARCH = 2

# keystoneauth writes each request as a curl command; tokens in it are hashed by keystoneauth itself.
_GLANCE_REQUEST = re.compile(r"^REQ: curl .*? -X (\S+) https?://[^/\s]+(\S*)")
_COMMAND = re.compile(r"^Running cmd \(subprocess\): (.*)$", re.DOTALL)
# "ctypes.dlopen" and the like are nothing to a file system; these are all that touch names.
_FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.truncate"})


class Recorder(logging.Handler):
    """What nova did since the last `take`: its log, its commands, its requests, the files it opened by itself."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.instances_path: str | None = None
        self._clear()

    def _clear(self) -> None:
        self._log: list[dict[str, str]] = []
        self._commands: list[str] = []
        self._glance_requests: list[str] = []
        self._opens: list[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if found := _GLANCE_REQUEST.match(message):
            self._glance_requests.append(f"{found[1]} {found[2]}")
        elif found := _COMMAND.match(message):
            self._commands.append(found[1])
        if record.levelno >= logging.INFO:
            if record.exc_info and record.exc_info[1] is not None:
                message += f" [{type(record.exc_info[1]).__name__}: {record.exc_info[1]}]"
            self._log.append({"level": record.levelname, "logger": record.name, "message": message})

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take an event of `sys.addaudithook`; an audit hook that raises would break nova, so it only looks."""
        if event not in _FILE_EVENTS or self.instances_path is None:
            return
        path = arguments[0]
        if isinstance(path, str) and path.startswith(self.instances_path):
            self._opens.append([event, path])

    def take(self) -> dict[str, Any]:
        """Give everything recorded since the last call."""
        taken = {
            "log": self._log,
            "commands": self._commands,
            "glance_requests": self._glance_requests,
            "opens": self._opens,
        }
        self._clear()
        return taken


def become(user: str) -> None:
    """Go on as `user`, with CAP_DAC_READ_SEARCH kept over setuid and exec; supplementary groups are dropped."""
    from oslo_privsep import capabilities

    entry = pwd.getpwnam(user)
    capabilities.set_keepcaps(True)
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    kept = [_CAP_DAC_READ_SEARCH]
    capabilities.drop_all_caps_except(kept, kept, kept)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_CAP_AMBIENT_RAISE)")
    os.environ["HOME"] = "/"


def start_privsep_daemon() -> None:
    """Start nova's real privsep daemon while we are still root; it stays root when we become somebody else."""
    import nova.conf
    import nova.privsep

    helper = os.path.join(os.path.dirname(sys.executable), "privsep-helper")
    nova.conf.CONF.set_override("helper_command", helper, group="nova_sys_admin")
    nova.privsep.sys_admin_pctxt.start()


def answer_one(compute: Any, recorder: Recorder, line: str) -> dict[str, Any]:
    """Run one command; whatever it raises is part of the answer, for the test to judge."""
    request = json.loads(line)
    recorder.take()
    started = time.monotonic()
    answer: dict[str, Any]
    try:
        answer = {"ok": True, "result": getattr(compute, "do_" + request.pop("command"))(**request)}
    except Exception as exc:
        answer = {
            "ok": False,
            "error": type(exc).__name__,
            "message": str(exc),
            "traceback": traceback.format_exc(),
        }
    answer["seconds"] = time.monotonic() - started
    recorder.instances_path = compute.instances_path
    return answer | recorder.take()


def claim_stdout() -> TextIO:
    """Give the stream for answers; what nova or its children print to fd 1 goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Serve commands until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--user", help="the uid to run as; without it nova and its privsep stay in this process")
    arguments = parser.parse_args()
    sys.argv[1:] = []  # nova 34 looks there for configuration files
    answers = claim_stdout()
    recorder = Recorder()
    logging.basicConfig(level=logging.DEBUG, handlers=[recorder])

    # As nova-compute's own start does (nova/cmd/compute.py): 34 runs native threads, 31 patches itself for eventlet.
    from nova import monkey_patch

    if hasattr(monkey_patch, "patch"):
        monkey_patch.patch(backend="threading")
    from nova_compute import Compute, prepare_nova

    prepare_nova()
    if arguments.user is None:
        import nova.privsep

        nova.privsep.sys_admin_pctxt.set_client_mode(False)
    else:
        start_privsep_daemon()
        become(arguments.user)
    compute = Compute()
    sys.addaudithook(recorder.audit)
    ready = {"ok": True, "result": {"nova": compute.version(), "uid": os.getuid()}} | recorder.take()
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(answer_one(compute, recorder, line)) + "\n")


if __name__ == "__main__":
    main()

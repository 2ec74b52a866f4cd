"""One basefs, mounted for a test, a benchmark or the demo, with everything it owns under one directory."""

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tools.secrets_used import SAID_LOG

ROOT = Path(__file__).resolve().parent.parent
BASEFS = ROOT / ".venv" / "bin" / "basefs"
RUN_VARIABLE = "BASEFS_TOOLS_RUN"
"""In the environment of every process we start, so that what a run left behind is found whatever it calls itself."""
MOUNT_TIMEOUT_S = 60.0
END_S = 10.0


class MountError(Exception):
    """basefs did not mount, or not unmount; the message has what it said."""


class BasefsMount:
    """`basefs mount --background` over `<directory>/instances/_base`, and the way back.

    `options` are further `[basefs]` lines; a key "SECTION.name" goes into that section, and a value of None takes a
    default of ours away. `prefix` is what commands begin with (to run in a network namespace). `basefs` is used as an
    operator would: by its command line and its files.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        glance_conf: str,
        options: Mapping[str, object] | None = None,
        *,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.directory = Path(directory)
        self._prefix = prefix
        self.instances_path = self.directory / "instances"
        self.mountpoint = self.instances_path / "_base"
        self.cache_dir = self.directory / "cache"
        self.conf_path = self.directory / "basefs.conf"
        self.log_path = self.directory / "basefs.log"
        self.run_id = uuid.uuid4().hex
        for path in (self.mountpoint, self.cache_dir):
            path.mkdir(parents=True, exist_ok=True)
        self.configure(glance_conf, options or {})

    def configure(self, glance_conf: str, options: Mapping[str, object]) -> None:
        """Write basefs.conf; what runs already goes on with the old one."""
        sections: dict[str, dict[str, object]] = {
            "DEFAULT": {"log_file": self.log_path},
            "basefs": {
                "mountpoint": self.mountpoint,
                "cache_dir": self.cache_dir,
                "control_socket": self.directory / "control.sock",
                "nova_user": "nobody",  # a user that every machine has
                "metrics_listen": "",  # a port that every mount of a test would want
                "lookup_deadline_s": 30.0,  # a first token and list took a real Glance 6 s on a loaded machine
                "hydrate_concurrency_max": 0,  # what is fetched is what was read
                "graduate": False,  # and what was fetched stays in the cache
                "template_image_handler": "downloading",  # and nobody is asked for volumes
            },
        }
        for key, value in options.items():
            section, _, name = key.rpartition(".")
            sections.setdefault(section or "basefs", {})[name] = value
        lines = []
        for section, values in sections.items():
            if section != "glance":
                lines.append(f"[{section}]")
                lines += [f"{name} = {value}" for name, value in values.items() if value is not None]
        lines.append(glance_conf.rstrip())
        lines += [f"{name} = {value}" for name, value in sections.get("glance", {}).items()]
        self.conf_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.conf_path.chmod(0o600)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            with contextlib.suppress(MountError):  # the first error says what is wrong
                self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> float:
        """Mount; returns the seconds until it served. MountError when it did not."""
        begun = time.monotonic()
        done = self.cli("mount", "--background", check=False, timeout_s=MOUNT_TIMEOUT_S)
        if done.returncode or not self.is_mounted:
            raise MountError(
                f"basefs mount exited with {done.returncode}: {done.stderr or done.stdout}\n{self.log_text[-2000:]}"
            )
        return time.monotonic() - begun

    def unmount(self) -> None:
        """`basefs unmount`, and every process of ours is gone when it returns; MountError otherwise."""
        with contextlib.ExitStack() as stack:
            ending = self._pidfds(stack)
            done = self.cli("unmount", check=False, timeout_s=MOUNT_TIMEOUT_S)
            if done.returncode or self.is_mounted:
                raise MountError(f"basefs unmount exited with {done.returncode}: {done.stderr or done.stdout}")
            left = self._wait_for_processes()
            # One that is ending has no environment any more, by which we find it, before its files are closed.
            for fd in ending if not left else ():
                select.select([fd], [], [], END_S)
        if left:
            raise MountError(f"left running after basefs unmount: {left}")

    def stop(self) -> None:
        """Take everything away, whatever state it is in; MountError when that needed more than `basefs unmount`."""
        trouble = ""
        if self.is_mounted:
            self._note_processes()
            try:
                self.unmount()
            except (MountError, subprocess.TimeoutExpired) as error:
                trouble = str(error)
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.mountpoint)], check=False, capture_output=True)
        for pid in self._wait_for_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            trouble = trouble or f"process {pid} had to be killed"
        if trouble:
            raise MountError(trouble)

    @property
    def is_mounted(self) -> bool:
        """Whether a basefs is mounted on the mount point, alive or not."""
        return str(self.mountpoint) in basefs_mounts()

    def pids(self) -> list[int]:
        """Processes that belong to this mount: started by it, and still running."""
        return pids_with_environment(self.run_id)

    def _pidfds(self, stack: contextlib.ExitStack) -> list[int]:
        """One of each process that runs now, closed with `stack`."""
        fds = []
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                fds.append(os.pidfd_open(pid))
                stack.callback(os.close, fds[-1])
        return fds

    def _wait_for_processes(self) -> list[int]:
        deadline = time.monotonic() + END_S
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def cli(self, *arguments: str, check: bool = True, timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
        """Run `basefs ARGUMENTS --config-file …` and return what it wrote; CalledProcessError when it fails."""
        done = subprocess.run(
            [*self._prefix, str(BASEFS), *arguments, "--config-file", str(self.conf_path)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        self._note_said(done.stdout, done.stderr)
        if check:
            done.check_returncode()
        return done

    def _note_said(self, *texts: str) -> None:
        """Keep what was said, for the suite's look at secrets."""
        with contextlib.suppress(OSError), open(self.directory / SAID_LOG, "a", encoding="utf-8") as said:
            said.writelines(f"{text}\n" for text in texts if text)

    def _note_processes(self) -> None:
        for pid in self.pids():
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    self._note_said(Path(f"/proc/{pid}/{name}").read_text(errors="replace").replace("\0", "\n"))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of our basefs; what is started with it is found by `pids` and ended by `stop`."""
        return {**os.environ, RUN_VARIABLE: self.run_id}

    def status(self) -> dict[str, Any]:
        """Return `basefs status -f json`."""
        status: dict[str, Any] = json.loads(self.cli("status", "-f", "json").stdout)
        return status

    def wait_for_images(self, count: int) -> None:
        """Return when the catalog, which fills in the background, knows `count` images; MountError when it does not."""
        deadline = time.monotonic() + MOUNT_TIMEOUT_S
        while (known := self.status()["images"]) < count:
            if time.monotonic() > deadline:
                raise MountError(f"{known} of {count} images known after {MOUNT_TIMEOUT_S:.0f} s")
            time.sleep(0.1)

    def image(self, reference: str) -> dict[str, Any]:
        """Return `basefs image show -f json` of an id, a base name or a unique image name."""
        image: dict[str, Any] = json.loads(self.cli("image", "show", reference, "-f", "json").stdout)
        return image

    def path(self, image_id: str) -> Path:
        """Return where the image's bytes are on the mount."""
        return self.mountpoint / base_name(image_id)

    @property
    def log_text(self) -> str:
        """Return what basefs has logged so far."""
        return self.log_path.read_text(encoding="utf-8") if self.log_path.exists() else ""


def base_name(image_id: str) -> str:
    """Return nova's name in _base for this image."""
    return hashlib.sha1(image_id.encode()).hexdigest()


def basefs_mounts() -> list[str]:
    """Return every mount point of a basefs on this machine, without touching any."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if after.startswith("fuse.basefs"):
                found.append(before.split()[4].replace("\\040", " "))
    return found


def pids_with_environment(run_id: str) -> list[int]:
    """Return the running processes that were started with this run id in their environment."""
    wanted = f"{RUN_VARIABLE}={run_id}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as environ:
                if wanted in environ.read().split(b"\0"):
                    found.append(int(entry))
    return found


def reader_pids(mount: BasefsMount) -> list[int]:
    """Return the processes that are readers of this mount now."""
    found = []
    for pid in pids_with_environment(mount.run_id):
        with contextlib.suppress(OSError):
            if b"basefs.reader" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found

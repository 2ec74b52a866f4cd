"""Checks of the machine: kernel, /dev/fuse, rights, directories, space."""

import contextlib
import os
import pwd
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from basefs.cli.cells import human_bytes
from basefs.cli.findings import Finding, error, ok, warning
from basefs.config import Settings

KERNEL_MIN = (5, 3)
"""pidfd_open, by which the keeper watches its server."""
KERNEL_WITH_RESEND = (6, 9)
FREE_BYTES_MIN = 10 * 1024**3
FUSE_CONF = Path("/etc/fuse.conf")


def check_host() -> Iterator[Finding]:
    """What does not depend on the configuration."""
    yield _kernel()
    yield _dev_fuse()
    yield _rights()
    yield _user_allow_other()


def check_directories(settings: Settings) -> Iterator[Finding]:
    """The cache directory, instances_path and the user that nova runs as."""
    yield from _cache_dir(settings.cache_dir)
    yield _instances_path(settings.instances_path)
    yield _nova_user(settings.nova_user)


def check_config_files(paths: Iterable[str]) -> Finding:
    """Files that were read and found right: whether anybody may read the passwords in them."""
    open_ones = [path for path in paths if Path(path).stat().st_mode & stat.S_IROTH]
    if open_ones:
        names = " ".join(open_ones)
        return warning("configuration", f"every user can read {names}, with the passwords in it: chmod 600 {names}")
    return ok("configuration", "every section, key and value is known and fits")


def free_space(check: str, path: Path | str, what: str) -> Finding:
    """How much the file system of `path` has left; a warning below FREE_BYTES_MIN."""
    fs = os.statvfs(path)
    free = fs.f_bavail * fs.f_frsize
    detail = f"{human_bytes(free)} of {human_bytes(fs.f_blocks * fs.f_frsize)} free for {what}"
    if free < FREE_BYTES_MIN:
        return warning(check, f"{detail}: little; reads go on without, what does not fit is fetched again")
    return ok(check, detail)


def _kernel() -> Finding:
    release = os.uname().release
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < KERNEL_MIN:
        return error("kernel", f"Linux {release}: too old; basefs needs 5.3")
    if version < KERNEL_WITH_RESEND:
        return warning(
            "kernel",
            f"Linux {release}: without FUSE_NOTIFY_RESEND (6.9), so requests that a killed server had taken hang "
            "until their caller is killed",
        )
    return ok("kernel", f"Linux {release}: a server can be replaced without a failed read")


def _dev_fuse() -> Finding:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return error("/dev/fuse", "does not exist: load the kernel module (modprobe fuse)")
    except OSError as exc:
        return error("/dev/fuse", f"{exc.strerror}: run as root, and in a container pass the device through")
    try:
        is_device = stat.S_ISCHR(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
    return ok("/dev/fuse", "can be opened") if is_device else error("/dev/fuse", "is no character device")


def _rights() -> Finding:
    if os.geteuid() == 0:
        return ok("rights", "root: may mount")
    return warning("rights", f"uid {os.geteuid()}: mount, unmount and the control socket need root; run this as root")


def _user_allow_other() -> Finding:
    is_set = False
    with contextlib.suppress(OSError):
        lines = FUSE_CONF.read_text(encoding="utf-8", errors="replace").splitlines()
        is_set = any(line.strip() == "user_allow_other" for line in lines)
    if is_set:
        return ok("user_allow_other", f"is set in {FUSE_CONF}")
    if os.geteuid() == 0:
        return ok("user_allow_other", f"is not set in {FUSE_CONF}, and not needed: the keeper mounts as root")
    return warning("user_allow_other", f"is not set in {FUSE_CONF}: only root can mount for other users")


def _cache_dir(path: Path) -> Iterator[Finding]:
    if not path.exists():
        parent = next(above for above in path.parents if above.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            yield error("cache_dir", f"{path} does not exist, and {parent} cannot be written: make it, owned by root")
            return
        yield ok("cache_dir", f"{path} does not exist yet; mount makes it")
        yield free_space("cache space", parent, "the cache")
        return
    if not path.is_dir():
        yield error("cache_dir", f"{path} is no directory")
        return
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as exc:
        yield error("cache_dir", f"{path} cannot be written: {exc.strerror}")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield warning("cache_dir", f"{path} has mode {mode:04o}: others can read images there; chmod 700 {path}")
    else:
        yield ok("cache_dir", f"{path} can be written, by its owner only")
    yield free_space("cache space", path, "the cache")


def _instances_path(path: Path) -> Finding:
    if path.is_dir():
        return ok("instances_path", f"{path} is there")
    return warning("instances_path", f"{path} is no directory: set it to nova's instances_path")


def _nova_user(name: str) -> Finding:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return warning(
            "nova_user",
            f"there is no user {name}: nova's cache manager would be shown every image; set nova_user to the user "
            "that nova-compute runs as",
        )
    return ok("nova_user", f"{name} is uid {entry.pw_uid}")

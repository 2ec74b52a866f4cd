"""A Ceph of one monitor, one OSD in memory and one manager, from Debian's packages (`tools/setup ceph`).

With a radosgw on it where one is wanted.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid

from tools.rig import radosgw
from tools.rig.processes import RigError, Service, environment, listening_socket, run

HERE = os.path.dirname(os.path.abspath(__file__))
POOLS = ("volumes", "images")
_UP_S = 60.0
_CONF = """[global]
fsid = {fsid}
mon host = [v2:{host}:{port},v1:{host}:{port_v1}]
public addr = {host}
cluster addr = {host}
keyring = {d}/keyring
run dir = {d}/run
log file = {d}/log/$name.log
admin socket = {d}/run/$name.$pid.asok
pid file = {d}/run/$name.pid
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon warn on pool no redundancy = false
mon allow pool delete = true
auth allow insecure global id reclaim = false
mon data = {d}/mon
osd data = {d}/osd
mgr data = {d}/mgr
osd objectstore = {objectstore}
memstore device bytes = 12884901888
bluestore block size = 4294967296
bluestore fsck on mount = false
bluestore cache autotune = false
bluestore cache size = 134217728
osd memory target = 939524096
osd op num shards = 2
mon osd full ratio = 0.99
mon data avail crit = 1
mon data avail warn = 1
ms bind ipv6 = false
"""


class Ceph:
    """The cluster in `directory`; pools `volumes` and `images`, users client.admin and client.basefs, who may read.

    All of it is on `host`, with `has_radosgw` a radosgw, too (on `radosgw_port`, once it is started). With `is_durable`
    its objects are in a file, and outlive `kill`.
    """

    def __init__(
        self,
        directory: str,
        venv: str,
        lifeline_fd: int | None,
        *,
        host: str = "127.0.0.1",
        has_radosgw: bool = False,
        is_durable: bool = False,
    ) -> None:
        self.directory = directory
        self.host = host
        self.radosgw_port = 0
        self._has_radosgw = has_radosgw
        self._objectstore = "bluestore" if is_durable else "memstore"
        # Where os-brick looks for the key: in /etc/ceph by cluster and user, whatever the configuration says.
        self.cluster = f"rig-{uuid.uuid4().hex[:8]}"
        self.conf_path = os.path.join(directory, "ceph.conf")
        self._client_keyring = f"/etc/ceph/{self.cluster}.client.admin.keyring"
        self._environment = environment(venv, CEPH_CONF=self.conf_path)
        self._lifeline_fd = lifeline_fd
        self._services: dict[str, Service] = {}

    def start(self, keystone_url: str | None = None) -> None:
        """Make the cluster and start it; returns when its OSD is up and the pools are there.

        Its radosgw will ask the Keystone at `keystone_url` who has a token; that may start later.
        """
        for name in ("run", "log", "mon", "osd", "mgr"):
            os.makedirs(os.path.join(self.directory, name), exist_ok=True)
        fsid = str(uuid.uuid4())
        with contextlib.ExitStack() as opened:
            sockets = [opened.enter_context(listening_socket(self.host)) for _ in range(3)]
            port, port_v1, self.radosgw_port = (sock.getsockname()[1] for sock in sockets)
        with open(self.conf_path, "w", encoding="utf-8") as conf:
            conf.write(
                _CONF.format(
                    d=self.directory,
                    fsid=fsid,
                    host=self.host,
                    port=port,
                    port_v1=port_v1,
                    objectstore=self._objectstore,
                )
            )
            if self._has_radosgw:
                conf.write(radosgw.conf(self.directory, self.host, self.radosgw_port, keystone_url))
        self._make_keys()
        self._start_monitor(fsid, f"[v2:{self.host}:{port},v1:{self.host}:{port_v1}]")
        self._start_osd()
        self._register("mgr.x", mon="allow profile mgr", osd="allow *")
        self.start_daemon("mgr.x")
        self._wait_for_osd()
        for pool in POOLS:
            self._ceph("osd", "pool", "create", pool, "8")
            self._ceph("osd", "pool", "application", "enable", pool, "rbd")
        self._register("client.basefs", mon="profile rbd", osd="profile rbd-read-only pool=images")
        if self._has_radosgw:
            os.makedirs(self._path("rgw"), exist_ok=True)
            self._register("client.rgw", mon="allow rw", osd="allow rwx")
            self.start_daemon("rgw")
            radosgw.make_users(self)

    def stop(self) -> None:
        """End it; clients' requests hang from now on."""
        for service in reversed(self._services.values()):  # an OSD that lost its monitor does not end by itself
            service.stop()
        self._services.clear()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._client_keyring)

    def kill(self, name: str) -> None:
        """SIGKILL a daemon: `osd.0`, `mon.a`, `mgr.x` or `rgw`."""
        service = self._services.pop(name)
        service.send(signal.SIGKILL)
        service.stop()

    def pause(self, name: str) -> None:
        """Freeze a daemon."""
        self._services[name].send(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Thaw a daemon; one that was killed is started again."""
        if name in self._services:
            self._services[name].send(signal.SIGCONT)
        else:
            self.start_daemon(name)

    def start_daemon(self, name: str) -> None:
        """Start a daemon, again after `kill`; returns when it answers, but of an OSD."""
        if name == "rgw":
            self._daemon("rgw", "radosgw", "-n", "client.rgw")
            self._services["rgw"].wait_for(radosgw.url(self.host, self.radosgw_port))
        else:
            kind, _, which = name.partition(".")
            self._daemon(name, f"ceph-{kind}", "-i", which)

    def command(self, *arguments: str) -> str:
        """Return what `ceph <arguments>` says as client.admin."""
        return self._output("ceph", "-c", self.conf_path, *arguments)

    def served(self) -> tuple[int, int]:
        """Return how many reads the OSD has answered so far, and the bytes that it sent for them."""
        asok = os.path.join(self.directory, "run", f"osd.0.{self._osd_pid()}.asok")
        counters = json.loads(self._output("ceph", "--admin-daemon", asok, "perf", "dump", "osd"))["osd"]
        return int(counters["op_r"]), int(counters["op_r_out_bytes"])

    def _osd_pid(self) -> int:
        with open(os.path.join(self.directory, "run", "osd.0.pid"), encoding="ascii") as pid:
            return int(pid.read())

    def radosgw_admin(self, *arguments: str) -> str:
        """Return what `radosgw-admin <arguments>` says."""
        return self._output("radosgw-admin", "-c", self.conf_path, *arguments)

    def _output(self, *argv: str) -> str:
        done = subprocess.run(argv, env=self._environment, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RigError(f"{' '.join(argv[:5])} exited with {done.returncode}: {done.stderr[-500:]}")
        return done.stdout

    @property
    def s3_url(self) -> str:
        """The endpoint of its radosgw for S3."""
        return radosgw.url(self.host, self.radosgw_port)

    @property
    def swift_url(self) -> str:
        """The storage URL of its radosgw for Swift."""
        return radosgw.url(self.host, self.radosgw_port) + "/swift/v1"

    @property
    def pids(self) -> dict[str, int]:
        """The leader of each daemon's process group."""
        return {name: service.pid for name, service in self._services.items()}

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _run(self, *argv: str) -> None:
        run("setup", list(argv), env=self._environment, log_directory=self._path("log"))

    def _ceph(self, *arguments: str) -> None:
        self._run("ceph", "-c", self.conf_path, *arguments)

    def _make_keys(self) -> None:
        admin = ("-g", "-n", "client.admin", "--cap", "mon", "allow *", "--cap", "osd", "allow *")
        self._run("ceph-authtool", "-C", self._path("keyring"), *admin, "--cap", "mgr", "allow *")
        os.makedirs(os.path.dirname(self._client_keyring), exist_ok=True)
        with open(self._path("keyring"), "rb") as keyring, open(self._client_keyring, "wb", opener=_private) as copy:
            copy.write(keyring.read())
        self._run("ceph-authtool", self._path("keyring"), "-g", "-n", "mon.", "--cap", "mon", "allow *")

    def _register(self, name: str, **capabilities: str) -> None:
        words = [word for service, may in capabilities.items() for word in ("--cap", service, may)]
        self._run("ceph-authtool", self._path("keyring"), "-g", "-n", name, *words)
        self._ceph("auth", "add", name, "-i", self._path("keyring"))

    def _start_monitor(self, fsid: str, address: str) -> None:
        monmap = self._path("monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        keyring = ("--keyring", self._path("keyring"))
        self._run("ceph-mon", "-c", self.conf_path, "-i", "a", "--mkfs", "--monmap", monmap, *keyring)
        self.start_daemon("mon.a")

    def _start_osd(self) -> None:
        osd_id = str(uuid.uuid4())
        self._ceph("osd", "new", osd_id)
        self._register("osd.0", mon="allow profile osd", osd="allow *", mgr="allow profile osd")
        self._run("ceph-osd", "-c", self.conf_path, "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self.start_daemon("osd.0")

    def _daemon(self, name: str, program: str, *arguments: str) -> None:
        lifeline = -1 if self._lifeline_fd is None else self._lifeline_fd
        held = [sys.executable, HERE + "/held.py", str(lifeline)]
        self._services[name] = Service.start(
            name,
            [*held, program, "-f", "-c", self.conf_path, *arguments],
            env=self._environment,
            log_directory=self._path("log"),
            pass_fds=() if self._lifeline_fd is None else (self._lifeline_fd,),
        )

    def _wait_for_osd(self) -> None:
        deadline = time.monotonic() + _UP_S
        stat = ["ceph", "-c", self.conf_path, "osd", "stat"]
        while "1 up" not in subprocess.run(stat, check=False, capture_output=True, text=True).stdout:
            if time.monotonic() > deadline:
                raise RigError(f"no OSD is up after {_UP_S:.0f} s, see {self._path('log')}")
            time.sleep(0.1)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)

"""The rig: starts and stops the services, and hands out what a test needs of them."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from tools.rig import radosgw, templates
from tools.rig.ceph import Ceph
from tools.rig.cinder import Cinder
from tools.rig.cinder_templates import GLANCE_RBD
from tools.rig.databases import template
from tools.rig.identity import PASSWORD, USERS, Keystone
from tools.rig.images import RigImages
from tools.rig.leftovers import release
from tools.rig.processes import ROOT, RigError, Service, environment, listening_socket

HERE = os.path.dirname(os.path.abspath(__file__))
ADMIN_TOKEN = "admin:admin:admin,member,reader"
_DIRECTORIES = ("log", "lock", "web", "glance/images", "glance/staging", "glance/tasks", "keystone")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRequest:
    """One request that Glance or Cinder has answered, or is answering now."""

    at: float
    method: str
    path: str
    query: str
    range: str
    status: int
    length: int


class Rig(RigImages):
    """Real services on `host`, everything they write under `directory`.

    With `auth="fake"` no Keystone runs: a token is "user:project:role,role", and a request without one is an admin's.
    With `auth="keystone"` a real Keystone issues tokens that live `token_expiration_s`. The services end with this
    process, however it ends; with `detached=True` only by `stop`.

    With `cinder=True` a real Cinder runs too, and Glance has stores in it (`upload_cinder`); with `nfs=True` one of
    them is on the stock NFS driver, with `ceph=True` one on the stock RBD driver, and Glance has its own rbd store,
    `ceph`, on the same cluster. All want root; Ceph wants `tools/setup ceph`.

    With `object_stores=True` there is a Ceph, without Cinder, and a radosgw on it, and Glance has the stores `ceph` and
    `s3`; behind a Keystone also `swift`. `upload(..., store=...)` takes them. Their bytes are in memory, and
    gone when the OSD is killed, unless it is "durable".
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        auth: Literal["fake", "keystone"] = "fake",
        http_store: bool = True,
        cinder: bool = False,
        nfs: bool = False,
        ceph: bool = False,
        object_stores: bool | Literal["durable"] = False,
        token_expiration_s: int = 3600,
        host: str = "127.0.0.1",
        threads: int = 16,
        detached: bool = False,
        venv: str | os.PathLike[str] | None = None,
    ) -> None:
        self.directory = os.path.abspath(directory)
        self.auth = auth
        self.host = host
        self._http_store = http_store
        self._token_expiration_s = token_expiration_s
        self._threads = threads
        self._venv = os.path.abspath(venv or os.path.join(ROOT, ".venvs", "glance"))
        self._services: dict[str, Service] = {}
        self._ports: dict[str, int] = {}
        self._lifeline: tuple[int, int] | None = None if detached else os.pipe()
        self._ceph: Ceph | None = None
        if ceph or object_stores:
            directory = self.directory + "/ceph"
            self._ceph = Ceph(
                directory,
                self._venv,
                self._lifeline_fd,
                host=host,
                has_radosgw=bool(object_stores),
                is_durable=object_stores == "durable",
            )
        self._has_object_stores = bool(object_stores)
        self._cinder: Cinder | None = None
        if cinder or nfs or ceph:
            self._cinder = Cinder(self.directory, self._venv, nfs=nfs, ceph=self._ceph if ceph else None)

    # -- life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything; returns when all of it answers. RigError, and nothing left running, if it cannot."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop everything, and take away what it left in the kernel; the directory stays."""
        for signum in (signal.SIGCONT, signal.SIGTERM):
            for service in self._services.values():
                service.send(signum)
        for service in self._services.values():
            service.stop()
        self._services.clear()
        if self._ceph:
            self._ceph.stop()
        if self._cinder:
            release(self.directory)
        for fd in self._lifeline or ():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._lifeline = None

    def _start(self) -> None:
        if not os.path.exists(self._venv + "/bin/gunicorn"):
            raise RigError(f"{self._venv} has no gunicorn: run `make setup`")
        for name in _DIRECTORIES:
            os.makedirs(os.path.join(self.directory, name), exist_ok=True)
        with contextlib.ExitStack() as opened:
            sockets = {name: opened.enter_context(listening_socket(self.host)) for name in self._wanted()}
            self._ports = {name: sock.getsockname()[1] for name, sock in sockets.items()}
            if self._ceph:
                self._ceph.start(self.keystone_url if self.auth == "keystone" else None)
            self._configure()
            if self._cinder and self._lifeline:
                self._launch_leftovers(self._lifeline[0])
            # Glance looks for its stores' volume types as it starts, with the password of a user who must be there.
            is_asked_by_glance = self.auth == "keystone" and (self._cinder or self._has_object_stores)
            after_keystone = ["glance"] if is_asked_by_glance else []
            for name, sock in sockets.items():
                if name not in after_keystone:
                    self._launch(name, sock)
            if self.auth == "keystone":
                self._populate_keystone()
            for name in after_keystone:
                self._launch(name, sockets[name])
        if self._cinder:
            self._services["cinder"].wait_for(self._health_url("cinder"))
            self._cinder.make_types(self.cinder_api())
        self._services["glance"].wait_for(self._health_url("glance"))

    def _populate_keystone(self) -> None:
        self._services["keystone"].wait_for(self.keystone_url)
        keystone = Keystone(self.keystone_url)
        keystone.populate()
        keystone.register("identity", self.keystone_url)
        keystone.register("image", self.glance_url)
        if self._cinder:
            keystone.register("block-storage", self.cinder_url)
        if self._has_object_stores:
            keystone.register("object-store", self.ceph.swift_url)

    def _wanted(self) -> list[str]:
        wanted = ["keystone"] if self.auth == "keystone" else []
        return [*wanted, *(["web"] if self._http_store else []), *(["cinder"] if self._cinder else []), "glance"]

    def stop_service(self, name: str) -> None:
        """End one service; its port refuses connections from now on."""
        self._services.pop(name).stop()

    def start_service(self, name: str) -> None:
        """Start a stopped service again on the port it had; returns when it answers."""
        with listening_socket(self.host, self._ports[name]) as sock:
            self._launch(name, sock)
        self._services[name].wait_for(self._health_url(name))

    def pause(self, name: str = "glance") -> None:
        """Freeze a service: it accepts connections and answers nothing."""
        self._services[name].send(signal.SIGSTOP)

    def resume(self, name: str = "glance") -> None:
        """Thaw a frozen service."""
        self._services[name].send(signal.SIGCONT)

    @property
    def pids(self) -> dict[str, int]:
        """The leader of each service's process group."""
        own = {name: service.pid for name, service in self._services.items()}
        return {**own, **(self._ceph.pids if self._ceph else {})}

    # -- what users need

    @property
    def web_url(self) -> str:
        """The web server's that the http store reads from, with a slash at its end."""
        return f"http://{self.host}:{self._ports['web']}/"

    @property
    def glance_url(self) -> str:
        """Glance's endpoint, without a version."""
        return f"http://{self.host}:{self._ports['glance']}"

    @property
    def keystone_url(self) -> str:
        """Keystone's endpoint, with /v3."""
        return f"http://{self.host}:{self._ports['keystone']}/v3"

    @property
    def ceph(self) -> Ceph:
        """The rig's Ceph, where it has one."""
        if self._ceph is None:
            raise RigError("this rig was made without ceph=True or object_stores=True")
        return self._ceph

    @property
    def cinder_url(self) -> str:
        """Cinder's endpoint, with /v3."""
        return f"http://{self.host}:{self._ports['cinder']}/v3"

    def token(self, user: str = "admin", project: str | None = None) -> str:
        """Return a token of `admin`, `basefs` (service, admin role), `u1` (demo1) or `u2` (demo2)."""
        if self.auth == "keystone":
            return Keystone(self.keystone_url).token(user, project)
        if user == "admin":
            return ADMIN_TOKEN if project is None else f"admin:{project}:admin,member,reader"
        home, roles = USERS[user]
        return f"{user}:{project or home}:{','.join(roles)}"

    def expire(self, token: str) -> None:
        """Make Glance and Cinder answer 401 to this token from now on (fake auth only)."""
        with open(os.path.join(self.directory, "expired-tokens"), "a", encoding="ascii") as expired:
            expired.write(token + "\n")

    def application_credential(self, user: str = "basefs") -> tuple[str, str]:
        """Return id and secret of a new application credential."""
        return Keystone(self.keystone_url).application_credential(user)

    def conf_lines(self) -> str:
        """Return the [glance] section of a basefs.conf that reaches this Glance, after [cinder] where there is one."""
        if self.auth == "fake":
            glance = f"[glance]\nauth_type = none\nendpoint_override = {self.glance_url}\n"
            override = f"endpoint_override = {self.cinder_url}\n" if self._cinder else ""
            return f"[cinder]\nauth_section = glance\n{override}{glance}" if self._cinder else glance
        cinder = "[cinder]\nauth_section = glance\nregion_name = RegionOne\n" if self._cinder else ""
        return (
            f"{cinder}[glance]\nauth_type = password\nauth_url = {self.keystone_url}\nusername = basefs\n"
            f"password = {PASSWORD}\nproject_name = service\nuser_domain_id = default\nproject_domain_id = default\n"
            f"region_name = RegionOne\n"
        )

    def requests(self, path_contains: str = "", service: Literal["glance", "cinder"] = "glance") -> list[ServedRequest]:
        """Return every request the service has begun to answer so far, oldest first; health checks are left out."""
        try:
            with open(self._request_log(service), encoding="utf-8") as lines:
                found = [ServedRequest(**json.loads(line)) for line in lines]
        except FileNotFoundError:
            return []
        return [one for one in found if path_contains in one.path and one.path != "/healthcheck"]

    # -- inside

    def _request_log(self, name: str) -> str:
        return os.path.join(self.directory, "log", f"{name}-requests.jsonl")

    @property
    def _lifeline_fd(self) -> int | None:
        return self._lifeline[0] if self._lifeline else None

    def _health_url(self, name: str) -> str:
        url = f"http://{self.host}:{self._ports[name]}/"
        return url + "healthcheck" if name in ("glance", "cinder") else url

    def _launch_leftovers(self, lifeline: int) -> None:
        argv = [sys.executable, HERE + "/leftovers.py", self.directory, str(lifeline)]
        self._services["leftovers"] = Service.start(
            "leftovers",
            argv,
            env=environment(self._venv),
            log_directory=os.path.join(self.directory, "log"),
            pass_fds=(lifeline,),
        )

    def _launch(self, name: str, sock: socket.socket) -> None:
        lifeline = -1 if self._lifeline_fd is None else self._lifeline_fd
        fds = (sock.fileno(), *([lifeline] if self._lifeline else []))
        python = [self._venv + "/bin/python", "-P"]  # -P: the services are imported from the venv, not from here
        if name == "web":
            argv = [sys.executable, HERE + "/web_origin.py", str(sock.fileno()), self.directory + "/web", str(lifeline)]
        elif name == "cinder":
            argv = [*python, HERE + "/cinder_service.py", self.directory + "/cinder/cinder.conf", str(sock.fileno())]
            argv += [str(lifeline), self._request_log(name)]
        else:
            argv = [*python, HERE + "/wsgi_run.py", f"{name}.wsgi.api:application", str(sock.fileno())]
            argv += [str(self._threads if name == "glance" else 4), str(lifeline), self._request_log(name)]
        env = environment(
            self._venv,
            path=self._cinder.path if self._cinder else "",
            OS_GLANCE_CONFIG_DIR=self.directory + "/glance",
            OS_KEYSTONE_CONFIG_FILES=self.directory + "/keystone/keystone.conf",
            RIG_EXPIRED=self.directory + "/expired-tokens",
            RIG_ANON=ADMIN_TOKEN,
        )
        self._services[name] = Service.start(
            name, argv, env=env, log_directory=os.path.join(self.directory, "log"), pass_fds=fds
        )

    def _configure(self) -> None:
        d, keystone = self.directory, self.auth == "keystone"
        with open(self._venv + "/etc/glance/glance-api-paste.ini", encoding="utf-8") as stock:
            _write(d + "/glance/glance-api-paste.ini", templates.paste_ini(stock.read()))
        backends = ["fs:file", *(["web:http"] if self._http_store else [])]
        backends += self._cinder.glance_backends if self._cinder else []
        if self._has_object_stores:
            backends += ["ceph:rbd"] if "ceph:rbd" not in backends else []
            backends += ["s3:s3", *(["swift:swift"] if keystone else [])]
        conf = templates.GLANCE.format(
            d=d,
            host=self.host,
            backends=", ".join(backends),
            flavor="keystone" if keystone else "fakeauth",
            web_port=self._ports.get("web", 80),
        )
        if keystone:
            conf += templates.AUTHTOKEN.format(keystone_url=self.keystone_url, password=PASSWORD, user="glance")
        if self._cinder:
            keystone_url = self.keystone_url if keystone else None
            conf += self._cinder.glance_conf(keystone_url or self.cinder_url)
            self._cinder.configure(host=self.host, glance_url=self.glance_url, keystone_url=keystone_url)
        if self._has_object_stores:
            if "\n[ceph]\n" not in conf:
                conf += GLANCE_RBD.format(conf=self.ceph.conf_path)
            conf += radosgw.glance_conf(d, self.ceph.s3_url, swift=keystone)
            if keystone:
                references = radosgw.SWIFT_REFERENCES.format(password=PASSWORD, keystone_url=self.keystone_url)
                _write(d + "/glance/swift.conf", references)
        _write(d + "/glance/glance-api.conf", conf)
        if not os.path.exists(d + "/glance.sqlite"):
            shutil.copyfile(template(self._venv, "glance") + "/glance.sqlite", d + "/glance.sqlite")
        if keystone:
            _write(d + "/keystone/keystone.conf", templates.KEYSTONE.format(d=d, expiration_s=self._token_expiration_s))
            if not os.path.exists(d + "/keystone/keystone.sqlite"):
                shutil.copytree(template(self._venv, "keystone") + "/keystone", d + "/keystone", dirs_exist_ok=True)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as out:
        out.write(text)


def wait_until_gone(pid: int, seconds: float) -> bool:
    """Return True as soon as no process `pid` is there, False after `seconds`."""
    deadline = time.monotonic() + seconds
    while os.path.exists(f"/proc/{pid}"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True

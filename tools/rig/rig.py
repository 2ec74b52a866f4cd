"""The rig: starts and stops the services, and hands out what a test needs of them."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from tools.rig import templates
from tools.rig.api import GlanceApi
from tools.rig.identity import PASSWORD, USERS, Keystone
from tools.rig.processes import RigError, Service, listening_socket, run

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
ADMIN_TOKEN = "admin:admin:admin,member,reader"
_DIRECTORIES = ("log", "lock", "web", "glance/images", "glance/staging", "glance/tasks", "keystone")


@dataclass(frozen=True, slots=True, kw_only=True)
class GlanceRequest:
    """One request that Glance has answered, or is answering now."""

    at: float
    method: str
    path: str
    query: str
    range: str
    status: int
    length: int


class Rig:
    """Real services on `host`, everything they write under `directory`.

    With `auth="fake"` no Keystone runs: a token is "user:project:role,role", and a request without one is an admin's.
    With `auth="keystone"` a real Keystone issues tokens that live `token_expiration_s`. The services end with this
    process, however it ends; with `detached=True` only by `stop`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        auth: Literal["fake", "keystone"] = "fake",
        http_store: bool = True,
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
        """Stop everything; the directory stays."""
        for signum in (signal.SIGCONT, signal.SIGTERM):
            for service in self._services.values():
                service.send(signum)
        for service in self._services.values():
            service.stop()
        self._services.clear()
        for fd in self._lifeline or ():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._lifeline = None

    def _start(self) -> None:
        if not os.path.exists(self._venv + "/bin/gunicorn"):
            raise RigError(f"{self._venv} has no gunicorn: run `make setup`")
        for name in _DIRECTORIES:
            os.makedirs(os.path.join(self.directory, name), exist_ok=True)
        sockets = {name: listening_socket(self.host) for name in self._wanted()}
        self._ports = {name: sock.getsockname()[1] for name, sock in sockets.items()}
        try:
            self._configure()
            for name, sock in sockets.items():
                self._launch(name, sock)
        finally:
            for sock in sockets.values():
                sock.close()
        if self.auth == "keystone":
            self._services["keystone"].wait_for(self.keystone_url)
            keystone = Keystone(self.keystone_url)
            keystone.populate()
            keystone.register("identity", self.keystone_url)
            keystone.register("image", self.glance_url)
        self._services["glance"].wait_for(self.glance_url + "/healthcheck")

    def _wanted(self) -> list[str]:
        wanted = ["keystone"] if self.auth == "keystone" else []
        return [*wanted, *(["web"] if self._http_store else []), "glance"]

    def stop_service(self, name: str) -> None:
        """End one service; its port refuses connections from now on."""
        self._services.pop(name).stop()

    def start_service(self, name: str) -> None:
        """Start a stopped service again on the port it had; returns when it answers."""
        with listening_socket(self.host, self._ports[name]) as sock:
            self._launch(name, sock)
        url = self.glance_url + "/healthcheck" if name == "glance" else f"http://{self.host}:{self._ports[name]}/"
        self._services[name].wait_for(url)

    def pause(self, name: str = "glance") -> None:
        """Freeze a service: it accepts connections and answers nothing."""
        self._services[name].send(signal.SIGSTOP)

    def resume(self, name: str = "glance") -> None:
        """Thaw a frozen service."""
        self._services[name].send(signal.SIGCONT)

    @property
    def pids(self) -> dict[str, int]:
        """The leader of each service's process group."""
        return {name: service.pid for name, service in self._services.items()}

    # -- what users need

    @property
    def glance_url(self) -> str:
        """Glance's endpoint, without a version."""
        return f"http://{self.host}:{self._ports['glance']}"

    @property
    def keystone_url(self) -> str:
        """Keystone's endpoint, with /v3."""
        return f"http://{self.host}:{self._ports['keystone']}/v3"

    def token(self, user: str = "admin", project: str | None = None) -> str:
        """Return a token of `admin`, `basefs` (service, admin role), `u1` (demo1) or `u2` (demo2)."""
        if self.auth == "keystone":
            return Keystone(self.keystone_url).token(user, project)
        if user == "admin":
            return ADMIN_TOKEN if project is None else f"admin:{project}:admin,member,reader"
        home, roles = USERS[user]
        return f"{user}:{project or home}:{','.join(roles)}"

    def expire(self, token: str) -> None:
        """Make Glance answer 401 to this token from now on (fake auth only)."""
        with open(os.path.join(self.directory, "expired-tokens"), "a", encoding="ascii") as expired:
            expired.write(token + "\n")

    def api(self, user: str = "admin") -> GlanceApi:
        """Return the Glance API as `user`."""
        return GlanceApi(self.glance_url, self.token(user))

    def upload(self, source: bytes | str | os.PathLike[str], name: str, disk_format: str = "raw", **props: Any) -> str:
        """Make an active image in the file store (ranges: 206) out of bytes or a file; returns its id."""
        return self.api().upload(source, name, disk_format, **props)

    def upload_web(
        self, source: bytes | str | os.PathLike[str], name: str, disk_format: str = "raw", **props: Any
    ) -> str:
        """Make an active image in the http store (ranges: 400) out of bytes or a file; returns its id."""
        api = self.api()
        image_id = api.create(name, disk_format, **props)
        target = os.path.join(self.directory, "web", image_id)
        if isinstance(source, bytes):
            with open(target, "wb") as copy:
                copy.write(source)
        else:
            shutil.copyfile(source, target)
        api.add_location(image_id, f"http://{self.host}:{self._ports['web']}/{image_id}")
        return image_id

    def clone(self, image_id: str, count: int) -> list[str]:
        """Return `count` new images with the bytes of an uploaded one, named `<its name>-<n>`.

        By SQL, because the API takes 0.1 s an image. They share the one file: deleting any of them takes it away.
        """
        ids = [str(uuid.uuid4()) for _ in range(count)]
        with contextlib.closing(sqlite3.connect(self.directory + "/glance.sqlite", timeout=60)) as db, db:
            _copy_rows(db, "images", "id", image_id, [{"id": new, "name": f"-{n}"} for n, new in enumerate(ids)])
            _copy_rows(db, "image_locations", "image_id", image_id, [{"id": None, "image_id": new} for new in ids])
        return ids

    def place(self, source: str | os.PathLike[str], name: str, disk_format: str = "raw", **props: Any) -> str:
        """As `upload` of a large sparse file, without sending it: seconds instead of a minute; it has no hashes."""
        with open(source, "rb") as file:  # Glance looks whether it is its disk_format
            image_id = self.upload(file.read(1 if disk_format == "raw" else 1 << 20), name, disk_format, **props)
        subprocess.run(["cp", "--sparse=always", str(source), self.data_path(image_id)], check=True)
        with contextlib.closing(sqlite3.connect(self.directory + "/glance.sqlite", timeout=60)) as db, db:
            db.execute(
                "UPDATE images SET size = ?, virtual_size = ?, checksum = NULL, os_hash_algo = NULL,"
                " os_hash_value = NULL WHERE id = ?",
                (os.stat(source).st_size, os.stat(source).st_size, image_id),
            )
        return image_id

    def data_path(self, image_id: str) -> str:
        """Return the file that holds an uploaded image's bytes, to damage it."""
        return os.path.join(self.directory, "glance", "images", image_id)

    def application_credential(self, user: str = "basefs") -> tuple[str, str]:
        """Return id and secret of a new application credential."""
        return Keystone(self.keystone_url).application_credential(user)

    def conf_lines(self) -> str:
        """Return the [glance] section of a basefs.conf that reaches this Glance."""
        if self.auth == "fake":
            return f"[glance]\nauth_type = none\nendpoint_override = {self.glance_url}\n"
        return (
            f"[glance]\nauth_type = password\nauth_url = {self.keystone_url}\nusername = basefs\n"
            f"password = {PASSWORD}\nproject_name = service\nuser_domain_id = default\nproject_domain_id = default\n"
            f"region_name = RegionOne\n"
        )

    def requests(self, path_contains: str = "") -> list[GlanceRequest]:
        """Return every request Glance has begun to answer so far, oldest first; health checks are left out."""
        try:
            with open(self._request_log("glance"), encoding="utf-8") as lines:
                found = [GlanceRequest(**json.loads(line)) for line in lines]
        except FileNotFoundError:
            return []
        return [one for one in found if path_contains in one.path and one.path != "/healthcheck"]

    # -- inside

    def _request_log(self, name: str) -> str:
        return os.path.join(self.directory, "log", f"{name}-requests.jsonl")

    def _environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "PATH", "TMPDIR")}
        kept["PATH"] = f"{self._venv}/bin:{kept.get('PATH', '')}"
        return {**kept, "PYTHONWARNINGS": "ignore", "PYTHONPATH": ROOT, **more}

    def _launch(self, name: str, sock: socket.socket) -> None:
        lifeline = self._lifeline[0] if self._lifeline else -1
        fds = (sock.fileno(), *([lifeline] if self._lifeline else []))
        if name == "web":
            argv = [sys.executable, HERE + "/web_origin.py", str(sock.fileno()), self.directory + "/web", str(lifeline)]
            env = self._environment()
        else:
            application = f"{name}.wsgi.api:application"
            # -P: not our directory but the venv is where keystone and glance are imported from.
            argv = [self._venv + "/bin/python", "-P", HERE + "/wsgi_run.py", application, str(sock.fileno())]
            argv += [str(self._threads if name == "glance" else 4), str(lifeline), self._request_log(name)]
            env = self._environment(
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
        conf = templates.GLANCE.format(
            d=d,
            host=self.host,
            backends="fs:file, web:http" if self._http_store else "fs:file",
            flavor="keystone" if keystone else "fakeauth",
            web_port=self._ports.get("web", 80),
        )
        if keystone:
            conf += templates.AUTHTOKEN.format(keystone_url=self.keystone_url, password=PASSWORD)
        _write(d + "/glance/glance-api.conf", conf)
        if not os.path.exists(d + "/glance.sqlite"):
            made = self._template("glance", self._make_glance_template)
            shutil.copyfile(made + "/glance.sqlite", d + "/glance.sqlite")
        if keystone:
            _write(d + "/keystone/keystone.conf", templates.KEYSTONE.format(d=d, expiration_s=self._token_expiration_s))
            if not os.path.exists(d + "/keystone/keystone.sqlite"):
                made = self._template("keystone", self._make_keystone_template)
                shutil.copytree(made + "/keystone", d + "/keystone", dirs_exist_ok=True)

    def _template(self, name: str, make: Callable[[str], None]) -> str:
        """Return the directory with an empty, migrated database of `name`; made once and kept: 2 to 7 s saved a rig."""
        version = next(
            entry for entry in sorted(os.listdir(_site_packages(self._venv))) if entry.startswith(name + "-")
        )
        # Keystone's holds the password: another one is another template.
        path = os.path.join(ROOT, ".cache", "rig", f"{version}-{hashlib.sha1(PASSWORD.encode()).hexdigest()[:8]}")
        if not os.path.isdir(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            scratch = tempfile.mkdtemp(dir=os.path.dirname(path), prefix=f".{name}-")
            make(scratch)
            try:
                os.rename(scratch, path)
            except OSError:  # another process was faster
                shutil.rmtree(scratch)
        return path

    def _make_glance_template(self, d: str) -> None:
        os.makedirs(d + "/log")
        _write(d + "/glance.conf", f"[database]\nconnection = sqlite:///{d}/glance.sqlite\n")
        argv = [self._venv + "/bin/glance-manage", "--config-file", d + "/glance.conf", "db", "sync"]
        run("glance-db", argv, env=self._environment(), log_directory=d + "/log")

    def _make_keystone_template(self, d: str) -> None:
        for name in ("log", "keystone/fernet", "keystone/credential"):
            os.makedirs(f"{d}/{name}", mode=0o700)
        _write(d + "/keystone.conf", templates.KEYSTONE.format(d=d, expiration_s=3600))
        manage = [self._venv + "/bin/keystone-manage", "--config-file", d + "/keystone.conf"]
        who = ["--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid())]
        for step in (
            ["db_sync"],
            ["fernet_setup", *who],
            ["credential_setup", *who],
            ["bootstrap", "--bootstrap-password", PASSWORD, "--bootstrap-region-id", "RegionOne"],
        ):
            run("keystone-" + step[0], [*manage, *step], env=self._environment(), log_directory=d + "/log")


def _site_packages(venv: str) -> str:
    lib = os.path.join(venv, "lib")
    return os.path.join(lib, os.listdir(lib)[0], "site-packages")


def _copy_rows(db: sqlite3.Connection, table: str, key: str, value: str, changes: list[dict[str, str | None]]) -> None:
    """Insert the rows with `key` = `value` once for each of `changes`; a changed name is added to the old one."""
    cursor = db.execute(f"SELECT * FROM {table} WHERE {key} = ?", (value,))
    columns = [column[0] for column in cursor.description]
    for row in cursor.fetchall():
        for change in changes:
            new = {**dict(zip(columns, row, strict=True)), **change}
            if "name" in change:
                new["name"] = f"{row[columns.index('name')]}{change['name']}"
            db.execute(
                f"INSERT INTO {table} ({', '.join(new)}) VALUES ({', '.join('?' * len(new))})", list(new.values())
            )


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

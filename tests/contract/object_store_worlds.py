"""The worlds of rbd, S3 and Swift without their servers: Ceph in memory, and web servers of objects."""

import errno
import threading
import uuid
from collections.abc import Collection
from typing import Any

from keystoneauth1 import loading
from oslo_config import cfg

from basefs.config.store_options import SWIFT_OPTS, RbdSettings, S3Settings, SwiftSettings, swift_common_opts
from basefs.sources.http_objects import HttpObjects
from basefs.sources.rbd_store import RbdStore
from basefs.sources.s3_store import S3Store, _signer
from basefs.sources.swift_store import open_swift
from tests.contract.store_worlds import SECRET, Fault
from tests.fakes.memory_ceph import MemoryCeph
from tests.fakes.object_server import ObjectServer
from tools.secrets_used import FAKE_PASSWORD, FAKE_TOKEN_PREFIX

ALL: Collection[Fault] = ("away", "cut", "forbid", "hang", "remove", "replace")
THREADS = 8
RBD_SETTINGS = RbdSettings(
    pools=("images", "more"), ceph_conf="/nowhere/ceph.conf", user="basefs", connect_timeout_s=5, op_timeout_s=10
)


class MemoryRbdWorld:
    """See `StoreWorld`."""

    faults = ALL

    def __init__(self, *, has_map: bool = True) -> None:
        self.ceph = MemoryCeph()
        self.has_map = has_map
        self.store = RbdStore(RBD_SETTINGS, threads_max=THREADS, library=self.ceph.library)

    def put(self, image_id: str, data: bytes) -> str:
        return self.ceph.add(image_id, data, has_map=self.has_map)

    def refused_locations(self, image_id: str) -> list[str]:
        fsid, other = self.ceph.fsid, uuid.uuid4()
        return [
            f"rbd://{fsid}/images/{other}/snap",
            f"rbd://{fsid}/volumes/{image_id}/snap",
            f"rbd://{fsid}/images/{image_id}/snap2",
            f"rbd://{fsid}/images/{image_id}/snap/more",
            f"rbd://{fsid}/images/..%2F{image_id}/snap",
            f"rbd://{fsid}/images/{image_id}%0a/snap",
            f"rbd://user:{SECRET}@{fsid}/images/{image_id}",
            f"rbd://{image_id}",
            f"s3://{fsid}/images/{image_id}/snap",
            "file:///etc/shadow",
            "rbd://" + "x" * 5000,
            "",
        ]

    def _key(self, location: str) -> tuple[str, str]:
        _, _, _, pool, image, _ = location.split("/")
        return pool, image

    def remove(self, location: str) -> None:
        del self.ceph.images[self._key(location)]

    def replace(self, location: str, data: bytes) -> None:
        self.remove(location)
        self.put(self._key(location)[1], data)

    def forbid(self) -> None:
        self.ceph.code = errno.EPERM

    def away(self) -> None:
        self.ceph.code = errno.ETIMEDOUT

    def cut(self) -> None:
        self.ceph.reads_before_code = self.ceph.reads + 3
        self.away()

    def hang(self) -> None:
        self.ceph.answers.clear()

    def heal(self) -> None:
        self.ceph.code = self.ceph.reads_before_code = 0
        self.ceph.answers.set()

    async def close(self) -> None:
        await self.store.close()
        assert (self.ceph.opened, self.ceph.connections) == (0, 0)


class _ServerWorld:
    """What S3 and Swift have in common."""

    faults = ALL
    store: HttpObjects

    def __init__(self) -> None:
        self.server = ObjectServer()
        self.server.__enter__()
        self.is_forbidden = False
        self.server.allows = self.allows

    def allows(self, method: str, path: str, headers: Any) -> bool:
        raise NotImplementedError

    def path_of(self, location: str) -> str:
        raise NotImplementedError

    def remove(self, location: str) -> None:
        del self.server.objects[self.path_of(location)]

    def replace(self, location: str, data: bytes) -> None:
        self.server.objects[self.path_of(location)] = data

    def forbid(self) -> None:
        self.is_forbidden = True

    def away(self) -> None:
        self.server.is_away = True

    def cut(self) -> None:
        self.server.cuts = True

    def hang(self) -> None:
        self.server.hold = threading.Event()

    def heal(self) -> None:
        if self.server.hold is not None:
            self.server.hold.set()
        self.server.hold = None
        self.server.is_away = self.server.cuts = self.is_forbidden = False

    async def close(self) -> None:
        await self.store.close()
        self.server.__exit__()


class ServerS3World(_ServerWorld):
    """A server that knows S3's signatures."""

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.settings = S3Settings(
            endpoint=self.server.url,
            buckets=("images", "site-*"),
            region="here",
            access_key="READER",
            secret_key=FAKE_PASSWORD,
            **more,
        )
        self.store = S3Store(self.settings, threads_max=THREADS)

    def put(self, image_id: str, data: bytes) -> str:
        self.server.objects[f"/images/{image_id}"] = data
        return f"s3://{self.server.host}/images/{image_id}"

    def path_of(self, location: str) -> str:
        return "/images/" + location.rpartition("/")[2]

    def allows(self, method: str, path: str, headers: Any) -> bool:
        """Whether a request has the signature that it would have if it were made just so, now."""
        signed = headers.get("Authorization", "").partition("SignedHeaders=")[2].partition(",")[0].split(";")
        ours = {name: headers[name.title()] for name in signed if name.title() in headers and name != "host"}
        signer = _signer(self.settings)
        assert signer is not None
        plain = {name: value for name, value in ours.items() if not name.startswith("x-amz-")}
        again = signer.signed(method, self.server.url + path, plain)
        if again["X-Amz-Date"] != headers.get("X-Amz-Date"):
            return not self.is_forbidden  # a second went by
        return not self.is_forbidden and again["Authorization"] == headers.get("Authorization")

    def refused_locations(self, image_id: str) -> list[str]:
        host, other = self.server.host, uuid.uuid4()
        return [
            f"s3://{host}/images/{other}",
            f"s3://{host}/private/{image_id}",
            f"s3://{host}/images/../{image_id}",
            f"s3://{host}/images/{image_id}?versionId=1",
            f"s3://169.254.169.254/images/{image_id}",
            f"s3://READER:{SECRET}@elsewhere/images/{image_id}",
            f"s3://{host}:{SECRET}@elsewhere/images/{image_id}",
            f"s3://http://{host}/images/{image_id}",
            f"http://{host}/images/{image_id}",
            f"swift://{host}/images/{image_id}",
            f"s3://{host}/{image_id}",
            "file:///etc/shadow",
            "",
        ]


class ServerSwiftWorld(_ServerWorld):
    """A server that gives out TempAuth's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0
        self.token = ""
        self.server.special = self._authenticate
        self.server.refusal = (401, b"<html><h1>Unauthorized</h1></html>")
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[])
        conf.register_opts([*SWIFT_OPTS, *swift_common_opts()], group="swift")
        conf.register_opts(loading.get_auth_plugin_conf_options("v1password"), group="swift")
        conf.register_opts(loading.get_auth_common_conf_options(), group="glance")
        values = {
            "auth_type": "v1password",
            "auth_url": f"{self.server.url}/auth/v1.0",
            "username": "account:reader",
            "password": FAKE_PASSWORD,
        }
        for name, value in values.items():
            conf.set_override(name, value, group="swift")
        self.store = open_swift(conf, SwiftSettings(containers=("images",)), threads_max=THREADS)

    def _authenticate(self, path: str, headers: Any) -> tuple[int, dict[str, str]] | None:
        if path != "/auth/v1.0":
            return None
        said = headers.get("X-Auth-User"), headers.get("X-Auth-Key")
        if self.is_forbidden or said != ("account:reader", FAKE_PASSWORD):
            return 401, {}
        self.tokens += 1
        self.token = f"{FAKE_TOKEN_PREFIX}{self.tokens}"
        return 204, {"X-Auth-Token": self.token, "X-Storage-Url": f"{self.server.url}/v1/AUTH_account"}

    def allows(self, method: str, path: str, headers: Any) -> bool:
        return not self.is_forbidden and headers.get("X-Auth-Token") == self.token

    def put(self, image_id: str, data: bytes) -> str:
        self.server.objects[f"/v1/AUTH_account/images/{image_id}"] = data
        return f"swift+config://ref1/images/{image_id}"

    def path_of(self, location: str) -> str:
        return "/v1/AUTH_account/images/" + location.rpartition("/")[2]

    def refused_locations(self, image_id: str) -> list[str]:
        host, other = self.server.host, uuid.uuid4()
        return [
            f"swift+config://ref1/images/{other}",
            f"swift+config://ref2/images/{image_id}",
            f"swift+config://ref1/private/{image_id}",
            f"swift+http://account%3Areader:{SECRET}@elsewhere/v3/images/{image_id}",
            f"swift+https://account:reader:{SECRET}@169.254.169.254/images/{image_id}",
            f"swift+http://{host}/auth/v1.0/images/{other}",
            f"http://{host}/v1/AUTH_account/images/{image_id}",
            f"swift+http://{host}/images/../{image_id}",
            "file:///etc/shadow",
            "",
        ]

"""The worlds of rbd, S3 and Swift on a real Ceph with radosgw, written by Glance's stock stores."""

import contextlib
import hashlib
import json
import uuid
from collections.abc import Collection, Iterator
from typing import Any

import requests
from keystoneauth1 import loading
from oslo_config import cfg

from basefs.config.store_options import SWIFT_OPTS, RbdSettings, S3Settings, SwiftSettings, swift_common_opts
from basefs.sources.ceph_cluster import load_library
from basefs.sources.rbd_store import RbdStore
from basefs.sources.s3_store import S3Store
from basefs.sources.swift_store import SwiftStore, open_swift
from tests.contract.store_worlds import SECRET, Fault
from tools.rig import Rig, radosgw
from tools.rig.api import Api
from tools.rig.identity import PASSWORD

THREADS = 8
SEGMENT_BYTES = 1 << 20
"""Of large objects in Swift."""
RBD_CAPS = ("mon", "profile rbd", "osd", "profile rbd-read-only pool=images")


class _RigWorld:
    """`daemon` is whom the store asks. `undo` has the way back from what was withdrawn."""

    daemon = "rgw"
    glance_store = ""
    store: Any

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.undo = contextlib.ExitStack()

    def put(self, image_id: str, data: bytes) -> str:
        self.rig.upload(data, "contract", store=self.glance_store, id=image_id)
        return str(self.rig.api().get(image_id)["direct_url"])

    def remove(self, location: str) -> None:
        image_id = next(part for part in location.split("/") if len(part) == 36 and part != self.fsid)
        self.rig.api().delete(image_id)

    @property
    def fsid(self) -> str:
        return self.rig.ceph.command("fsid").strip()

    def hang(self) -> None:
        self.rig.ceph.pause(self.daemon)

    def away(self) -> None:
        self.rig.ceph.kill(self.daemon)

    def heal(self) -> None:
        self.rig.ceph.resume(self.daemon)
        self.undo.close()

    async def close(self) -> None:
        await self.store.close()


class RealRbdWorld(_RigWorld):
    """As client.basefs, with the caps that OPERATIONS names."""

    faults: Collection[Fault] = ("away", "hang", "remove", "replace")
    daemon = "osd.0"
    glance_store = "ceph"

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        settings = RbdSettings(
            pools=("images",), ceph_conf=rig.ceph.conf_path, user="basefs", connect_timeout_s=5, op_timeout_s=3
        )
        self.store = RbdStore(settings, threads_max=THREADS)

    def away(self) -> None:
        self.hang()  # without an OSD a client of Ceph waits, too

    def refused_locations(self, image_id: str) -> list[str]:
        return [
            f"rbd://{self.fsid}/volumes/{image_id}/snap",
            f"rbd://{self.fsid}/images/{uuid.uuid4()}/snap",
            f"rbd://{self.fsid}/images/{image_id}/other",
        ]

    def replace(self, location: str, data: bytes) -> None:
        """An image with the name of the old one, as if Glance had used the id again."""
        image_id = location.split("/")[-2]
        with self._pool() as (rbd, pool):
            with rbd.Image(pool, image_id) as image:
                image.unprotect_snap("snap")
                image.remove_snap("snap")
            rbd.RBD().remove(pool, image_id)
            rbd.RBD().create(pool, image_id, len(data), 23, old_format=False, features=61)
            with rbd.Image(pool, image_id) as image:
                image.write(data, 0)
                image.create_snap("snap")

    def remake_snapshot(self, location: str, data: bytes) -> None:
        """Another snapshot with the name of the old one, of the same RBD image with other bytes."""
        with self._pool() as (rbd, pool), rbd.Image(pool, location.split("/")[-2]) as image:
            image.unprotect_snap("snap")
            image.remove_snap("snap")
            image.write(data, 0)
            image.create_snap("snap")

    @contextlib.contextmanager
    def _pool(self) -> Iterator[tuple[Any, Any]]:
        """librbd and Glance's pool, as client.admin."""
        library = load_library()
        assert library is not None
        with contextlib.ExitStack() as opened:
            cluster = library.rados.Rados(conffile=self.rig.ceph.conf_path, rados_id="admin")
            cluster.connect()
            opened.callback(cluster.shutdown)
            pool = cluster.open_ioctx("images")
            opened.callback(pool.close)
            yield library.rbd, pool

    def withdraw_caps(self) -> None:
        """The user may not read the pool any more, and what it has open is ended.

        (By itself an OSD believes a client until its ticket ends, after an hour.)
        """
        self.rig.ceph.command("auth", "caps", "client.basefs", "mon", "allow r", "osd", "allow r pool=volumes")
        self.undo.callback(self.rig.ceph.command, "auth", "caps", "client.basefs", *RBD_CAPS)
        self.end_connection()

    def end_connection(self) -> None:
        """As an administrator, or another client's fencing, blocklists one."""
        cluster = self.store._clusters[-1]
        self.rig.ceph.command("osd", "blocklist", "add", cluster._rados.get_addrs())


class RealS3World(_RigWorld):
    """As a user who by a bucket policy may read Glance's bucket."""

    faults: Collection[Fault] = ("away", "forbid", "hang", "remove", "replace")
    glance_store = "s3"

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        settings = S3Settings(
            endpoint=rig.ceph.s3_url,
            buckets=(radosgw.BUCKET,),
            region="default",
            access_key=radosgw.READER_KEY,
            secret_key=radosgw.READER_SECRET,
        )
        self.store = S3Store(settings, threads_max=THREADS)

    def refused_locations(self, image_id: str) -> list[str]:
        host = self.rig.ceph.s3_url.removeprefix("http://")
        return [
            f"s3://{host}/private/{image_id}",
            f"s3://K:{SECRET}@{host}1/{radosgw.BUCKET}/{image_id}",
            f"s3://{host}/{radosgw.BUCKET}/{uuid.uuid4()}",
        ]

    def replace(self, location: str, data: bytes) -> None:
        client = radosgw.s3_client(self.rig.ceph.s3_url)
        client.put_object(Bucket=radosgw.BUCKET, Key=location.rpartition("/")[2], Body=data)

    def forbid(self) -> None:
        self._admin("user", "suspend")
        self.undo.callback(self._admin, "user", "enable")

    def withdraw_policy(self) -> None:
        """The bucket lets nobody but its owner read it."""
        radosgw.s3_client(self.rig.ceph.s3_url).delete_bucket_policy(Bucket=radosgw.BUCKET)
        self.undo.callback(radosgw.allow_reader, self.rig.ceph.s3_url)

    def remove_key(self) -> None:
        """The reader's key is none any more."""
        key = f"--access-key={radosgw.READER_KEY}"
        self._admin("key", "rm", key)
        self.undo.callback(self._admin, "key", "create", key, f"--secret={radosgw.READER_SECRET}")

    def _admin(self, what: str, verb: str, *arguments: str) -> None:
        # (While a radosgw that was killed is still taken for one that listens, a change takes half a minute.)
        self.rig.ceph.radosgw_admin(what, verb, "--uid=rigreader", *arguments)


class RealSwiftWorld(_RigWorld):
    """With Keystone's tokens, as user u1 of another project, whom the container's ACL lets read it."""

    faults: Collection[Fault] = ("away", "forbid", "hang", "remove", "replace")
    glance_store = "swift"

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        found = Api(rig.keystone_url).call("GET", "/projects?name=demo1", headers={"X-Auth-Token": rig.token()})[1]
        self._project = str(found["projects"][0]["id"])
        self._make_container()
        self._let_read(self._project)
        self.store = self._store(
            auth_type="password",
            auth_url=rig.keystone_url,
            username="u1",
            password=PASSWORD,
            project_name="demo1",
            user_domain_id="default",
            project_domain_id="default",
            region_name="RegionOne",
        )

    def _store(self, **values: str) -> SwiftStore:
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[])
        conf.register_opts([*SWIFT_OPTS, *swift_common_opts()], group="swift")
        conf.register_opts(loading.get_auth_plugin_conf_options(values["auth_type"]), group="swift")
        conf.register_opts(loading.get_auth_common_conf_options(), group="glance")
        for name, value in values.items():
            conf.set_override(name, value, group="swift")
        return open_swift(conf, SwiftSettings(containers=(radosgw.CONTAINER,)), threads_max=THREADS)

    def refused_locations(self, image_id: str) -> list[str]:
        return [
            f"swift+config://ref1/private/{image_id}",
            f"swift+http://service:glance:{SECRET}@elsewhere/v3/{radosgw.CONTAINER}/{image_id}",
            f"swift+config://ref1/{radosgw.CONTAINER}/{uuid.uuid4()}",
        ]

    def replace(self, location: str, data: bytes) -> None:
        self.request("PUT", location.rpartition("/")[2], data)

    def forbid(self) -> None:
        self._let_read("")
        self.undo.callback(self._let_read, self._project)

    def _make_container(self) -> None:
        """If it is not there: a PUT of one that is, with another ACL than it has, is answered 409 by radosgw."""
        try:
            self.request("HEAD", "")
        except requests.HTTPError as exc:
            if exc.response.status_code != 404:
                raise
            self.request("PUT", "")

    def _let_read(self, acl: str) -> None:
        self.request("POST", "", **{"X-Container-Read": acl})

    def request(self, method: str, name: str, data: bytes = b"", **headers: str) -> None:
        """To an object in Glance's container, or to that, as Glance's user."""
        answer = requests.request(
            method,
            f"{self.rig.ceph.swift_url}/{radosgw.CONTAINER}/{name}".rstrip("/"),
            data=data,
            headers={"X-Auth-Token": self.rig.token("glance"), **headers},
            timeout=30,
        )
        answer.raise_for_status()


class RealDynamicSwiftWorld(RealSwiftWorld):
    """Objects in segments behind a dynamic manifest, as Glance makes large ones (radosgw 16 takes none from Glance)."""

    def put(self, image_id: str, data: bytes) -> str:
        for number, segment in enumerate(_segments(data)):
            self.request("PUT", f"{image_id}-{number:05}", segment)
        self.request("PUT", image_id, **{"X-Object-Manifest": f"{radosgw.CONTAINER}/{image_id}-"})
        return f"swift+config://ref1/{radosgw.CONTAINER}/{image_id}"

    def remove(self, location: str) -> None:
        self.request("DELETE", location.rpartition("/")[2])

    def replace(self, location: str, data: bytes) -> None:
        image_id = location.rpartition("/")[2]
        self.put(image_id, data)
        with contextlib.suppress(requests.HTTPError):  # of segments that are none of it any more
            for number in range(len(_segments(data)), 10):
                self.request("DELETE", f"{image_id}-{number:05}")


class RealStaticSwiftWorld(RealDynamicSwiftWorld):
    """Behind a static manifest, as other tools make them."""

    def put(self, image_id: str, data: bytes) -> str:
        manifest = []
        for segment in _segments(data):
            name = f"{image_id}-{uuid.uuid4()}"
            self.request("PUT", name, segment)
            tag = hashlib.md5(segment, usedforsecurity=False).hexdigest()
            manifest.append({"path": f"/{radosgw.CONTAINER}/{name}", "etag": tag, "size_bytes": len(segment)})
        self.request("PUT", f"{image_id}?multipart-manifest=put", json.dumps(manifest).encode())
        return f"swift+config://ref1/{radosgw.CONTAINER}/{image_id}"

    def replace(self, location: str, data: bytes) -> None:
        self.put(location.rpartition("/")[2], data)


def _segments(data: bytes) -> list[bytes]:
    return [data[start : start + SEGMENT_BYTES] for start in range(0, len(data), SEGMENT_BYTES)]

"""The worlds of rbd, S3 and Swift on a real Ceph with radosgw, written by Glance's stock stores."""

import contextlib
import uuid
from collections.abc import Collection
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
from tools.rig.identity import PASSWORD

THREADS = 8


class _RigWorld:
    """`daemon` is whom the store asks."""

    daemon = "rgw"
    glance_store = ""
    store: Any

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

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
        return [f"rbd://{self.fsid}/volumes/{image_id}/snap", f"rbd://{self.fsid}/images/{uuid.uuid4()}/snap"]

    def replace(self, location: str, data: bytes) -> None:
        """An image with the name of the old one, as if Glance had used the id again."""
        *_, pool, image_id, _snap = location.split("/")
        library = load_library()
        assert library is not None
        with contextlib.ExitStack() as opened:
            cluster = library.rados.Rados(conffile=self.rig.ceph.conf_path, rados_id="admin")
            cluster.connect()
            opened.callback(cluster.shutdown)
            ioctx = cluster.open_ioctx(pool)
            opened.callback(ioctx.close)
            with library.rbd.Image(ioctx, image_id) as image:
                image.unprotect_snap("snap")
                image.remove_snap("snap")
            library.rbd.RBD().remove(ioctx, image_id)
            library.rbd.RBD().create(ioctx, image_id, len(data), 23, old_format=False, features=61)
            with library.rbd.Image(ioctx, image_id) as image:
                image.write(data, 0)
                image.create_snap("snap")


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
        self.rig.ceph.radosgw_admin("user", "suspend", "--uid=rigreader")

    def heal(self) -> None:
        super().heal()
        self.rig.ceph.radosgw_admin("user", "enable", "--uid=rigreader")


class RealSwiftWorld(_RigWorld):
    """With Keystone's tokens, as user basefs of the project that Glance's container is in."""

    faults: Collection[Fault] = ("away", "hang", "remove", "replace")
    glance_store = "swift"

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self.store = self._store(
            auth_type="password",
            auth_url=rig.keystone_url,
            username="basefs",
            password=PASSWORD,
            project_name="service",
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
        self.put_object(location.rpartition("/")[2], data)

    def put_object(self, name: str, data: bytes, **headers: str) -> None:
        """An object in Glance's container."""
        token = {"X-Auth-Token": self.rig.token("glance"), **headers}
        answer = requests.put(
            f"{self.rig.ceph.swift_url}/{radosgw.CONTAINER}/{name}", data=data, headers=token, timeout=30
        )
        answer.raise_for_status()

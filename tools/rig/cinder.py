"""What a rig with Cinder has: its files and configuration, Glance's stores in it, volumes with an image's bytes."""

import hashlib
import math
import os
import shutil
import subprocess
import uuid
from typing import Any, Literal

from tools.rig import cinder_templates as templates
from tools.rig.api import GlanceApi
from tools.rig.ceph import Ceph
from tools.rig.cinder_api import CinderApi
from tools.rig.databases import template
from tools.rig.identity import PASSWORD
from tools.rig.templates import AUTHTOKEN

Backend = Literal["loop", "nfs", "rbd"]
NFS_EXPORT = "127.0.0.1:/rig"
_GIB = 1 << 30
_DIRECTORIES = ("volumes", "conversion", "coordination", "mnt", "share", "bin")
# A volume type, and Glance's store of the same name: the backend, and whether it is multiattach.
_TYPES: dict[str, tuple[Backend, bool]] = {"multi": ("loop", True), "plain": ("loop", False)}
_TYPES |= {"nfs": ("nfs", False), "rbd": ("rbd", True)}


class Cinder:
    """Cinder's part of the rig in `directory`: the loop driver's backend, with `nfs` and `ceph` the stock drivers'."""

    def __init__(self, directory: str, venv: str, *, nfs: bool, ceph: Ceph | None) -> None:
        self._directory = directory
        self._venv = venv
        self._ceph = ceph
        self._backends: list[Backend] = ["loop"]
        if nfs:
            self._backends.append("nfs")
        if ceph:
            self._backends.append("rbd")
        self.stores = [name for name, (backend, _) in _TYPES.items() if backend in self._backends]

    @property
    def path(self) -> str:
        """A directory for the front of PATH: there `mount -t nfs` works on a kernel without NFS."""
        return os.path.join(self._directory, "cinder", "bin")

    @property
    def share(self) -> str:
        """The directory that NFS_EXPORT stands for."""
        return os.path.join(self._directory, "cinder", "share")

    def configure(self, *, host: str, glance_url: str, keystone_url: str | None) -> None:
        """Write all that Cinder starts with; a database that is there already stays."""
        d = self._directory
        for name in _DIRECTORIES:
            os.makedirs(f"{d}/cinder/{name}", exist_ok=True)
        with open(self._venv + "/etc/cinder/api-paste.ini", encoding="utf-8") as stock:
            _write(d + "/cinder/api-paste.ini", templates.paste_ini(stock.read()))
        conf = templates.CINDER.format(
            d=d,
            venv=self._venv,
            host=host,
            auth_strategy="keystone" if keystone_url else "noauth",
            glance_url=glance_url,
            backends=",".join(self._backends),
        )
        if keystone_url:
            authtoken = AUTHTOKEN.format(keystone_url=keystone_url, password=PASSWORD, user="cinder")
            conf = conf.replace("[keystone_authtoken]\nservice_token_roles = service\n", authtoken)
        conf += templates.LOOP_BACKEND.format(d=d)
        if "nfs" in self._backends:
            conf += templates.NFS_BACKEND.format(d=d)
            self._stand_in_for_nfs()
        if self._ceph:
            conf += templates.RBD_BACKEND.format(cluster=self._ceph.cluster, conf=self._ceph.conf_path)
        _write(d + "/cinder/cinder.conf", conf)
        if not os.path.exists(d + "/cinder/cinder.sqlite"):
            shutil.copyfile(template(self._venv, "cinder") + "/cinder.sqlite", d + "/cinder/cinder.sqlite")

    def glance_conf(self, auth_url: str) -> str:
        """Return the sections of glance-api.conf for its stores in Cinder, as user glance at this Keystone."""
        d = self._directory
        stores = "".join(
            templates.GLANCE_STORE.format(store=store, auth_url=auth_url, password=PASSWORD, d=d)
            for store in self.stores
        )
        if self._ceph:
            stores += templates.GLANCE_RBD.format(conf=self._ceph.conf_path)
        return stores + templates.GLANCE_BRICK.format(d=d, venv=self._venv)

    def make_types(self, api: CinderApi) -> None:
        """Make the volume types, one for each store, and lift the quotas, 10 volumes, that a new database has."""
        limits = dict.fromkeys(("volumes", "gigabytes", "snapshots"), -1)
        api.call("PUT", "/os-quota-class-sets/default", {"quota_class_set": limits})
        for store in self.stores:
            backend, is_multiattach = _TYPES[store]
            multiattach = {"multiattach": "<is> True"} if is_multiattach else {}
            api.create_type(store, volume_backend_name=backend, **multiattach)

    @property
    def glance_backends(self) -> list[str]:
        """What Glance's `enabled_backends` lists: the stores in Cinder, and on a rig with a Ceph its own, `ceph`."""
        return [f"{store}:cinder" for store in self.stores] + (["ceph:rbd"] if self._ceph else [])

    def store(self, backend: Backend, *, multiattach: bool) -> str:
        """Return the name of Glance's store, and of the volume type, for images of this kind."""
        return next(store for store in self.stores if _TYPES[store] == (backend, multiattach))

    def place(
        self,
        glance: GlanceApi,
        api: CinderApi,
        source: str,
        store: str,
        *,
        name: str,
        disk_format: str,
        size: int | None,
        **props: Any,
    ) -> str:
        """Make an active image of `size` over a volume with the file's bytes, zeros behind them; nothing is sent."""
        image_id, size = str(uuid.uuid4()), size or os.stat(source).st_size
        size_gib = max(1, math.ceil(size / _GIB))
        metadata = {"glance_image_id": image_id, "image_size": str(size), "readonly": "True"}
        volume_id = api.create_volume(size_gib, store, name=f"image-{image_id}", metadata=metadata)
        path = self.volume_path(volume_id, _TYPES[store][0])
        subprocess.run(["cp", "--sparse=always", source, path], check=True)
        os.truncate(path, size_gib * _GIB)
        glance.create(name, disk_format, id=image_id, **props)
        glance.add_location(image_id, f"cinder://{store}/{volume_id}", store=store)
        return image_id

    def volume_path(self, volume_id: str, backend: Backend = "loop") -> str:
        """Return the file that holds a volume's bytes, to damage it."""
        directory = self.share if backend == "nfs" else os.path.join(self._directory, "cinder", "volumes")
        return os.path.join(directory, f"volume-{volume_id}")

    def _stand_in_for_nfs(self) -> None:
        _write(self._directory + "/cinder/nfs-shares", NFS_EXPORT + "\n")
        mount = shutil.which("mount") or "/usr/bin/mount"
        for name, text in (
            ("mount", templates.MOUNT.format(mount=mount, share=self.share)),
            ("mount.nfs", "#!/bin/sh\n"),  # the driver looks whether there is one
        ):
            _write(os.path.join(self.path, name), text)
            os.chmod(os.path.join(self.path, name), 0o755)


def nfs_mount_point(base: str) -> str:
    """Return where Cinder and os-brick mount NFS_EXPORT below their mount point base."""
    return os.path.join(base, hashlib.md5(NFS_EXPORT.encode()).hexdigest())


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as out:
        out.write(text)

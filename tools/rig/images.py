"""The images of a rig: made by Glance's API, or quicker, in each of its stores."""

import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from typing import Any

from tools.rig.api import GlanceApi
from tools.rig.cinder import Backend, Cinder
from tools.rig.cinder_api import CinderApi
from tools.rig.databases import copy_image_rows, set_image_size
from tools.rig.processes import RigError


class RigImages(ABC):
    """What a rig does with images; a rig says where its services are."""

    directory: str
    _cinder: Cinder | None

    @property
    @abstractmethod
    def glance_url(self) -> str: ...

    @property
    @abstractmethod
    def cinder_url(self) -> str: ...

    @property
    @abstractmethod
    def web_url(self) -> str: ...

    @abstractmethod
    def token(self, user: str = "admin", project: str | None = None) -> str: ...

    def api(self, user: str = "admin") -> GlanceApi:
        """Return the Glance API as `user`."""
        return GlanceApi(self.glance_url, self.token(user))

    def cinder_api(self, user: str = "admin") -> CinderApi:
        """Return the Cinder API as `user`."""
        return CinderApi(self.cinder_url, self.token(user))

    @property
    def cinder(self) -> Cinder:
        """Cinder's part of a rig that has one."""
        if self._cinder is None:
            raise RigError("this rig was made without cinder=True")
        return self._cinder

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
        api.add_location(image_id, self.web_url + image_id)
        return image_id

    def upload_cinder(
        self,
        source: bytes | str | os.PathLike[str],
        name: str,
        disk_format: str = "raw",
        *,
        multiattach: bool = True,
        backend: Backend = "loop",
        **props: Any,
    ) -> str:
        """Make an active image in Glance's cinder store; returns its id. 2 s each: `place_cinder` is quicker.

        No volume of the NFS driver is multiattach.
        """
        store = self.cinder.store(backend, multiattach=multiattach)
        return self.api().upload(source, name, disk_format, store=store, **props)

    def place_cinder(
        self,
        source: str | os.PathLike[str],
        name: str,
        disk_format: str = "raw",
        *,
        multiattach: bool = True,
        backend: Backend = "loop",
        size: int | None = None,
        **props: Any,
    ) -> str:
        """As `upload_cinder` of a file, with zeros behind it up to `size`, in 0.5 s; the image has no hashes.

        Not on the RBD driver, whose volumes are no files.
        """
        store = self.cinder.store(backend, multiattach=multiattach)
        return self.cinder.place(
            self.api("glance"),
            self.cinder_api("glance"),
            os.fspath(source),
            store,
            name=name,
            disk_format=disk_format,
            size=size,
            **props,
        )

    def volume_of(self, image_id: str) -> str:
        """Return the id of the volume that Glance keeps this image in."""
        return str(self.api().get(image_id)["direct_url"]).rpartition("/")[2]

    def clone(self, image_id: str, count: int) -> list[str]:
        """Return `count` new images with the bytes of an uploaded one, named `<its name>-<n>`.

        By SQL, because the API takes 0.1 s an image. They share the one file: deleting any of them takes it away.
        """
        return copy_image_rows(self.directory + "/glance.sqlite", image_id, count)

    def place(self, source: str | os.PathLike[str], name: str, disk_format: str = "raw", **props: Any) -> str:
        """As `upload` of a large sparse file, without sending it: seconds instead of a minute; it has no hashes."""
        with open(source, "rb") as file:  # Glance looks whether it is its disk_format
            image_id = self.upload(file.read(1 if disk_format == "raw" else 1 << 20), name, disk_format, **props)
        subprocess.run(["cp", "--sparse=always", str(source), self.data_path(image_id)], check=True)
        set_image_size(self.directory + "/glance.sqlite", image_id, os.stat(source).st_size)
        return image_id

    def data_path(self, image_id: str) -> str:
        """Return the file that holds an uploaded image's bytes, to damage it."""
        return os.path.join(self.directory, "glance", "images", image_id)

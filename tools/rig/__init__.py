"""A real Glance, and if asked for a real Keystone and Cinder, on loopback, as plain processes under one directory.

Runs the services from `.venvs/glance`; imports nothing but the standard library, so that every venv can use it:

    with Rig(directory) as rig:
        image_id = rig.upload(b"...", "cirros")
        print(rig.glance_url, rig.conf_lines())
"""

from tools.rig.api import ApiError, GlanceApi
from tools.rig.cinder_api import CinderApi
from tools.rig.identity import PASSWORD
from tools.rig.processes import RigError
from tools.rig.rig import Rig, ServedRequest

__all__ = ["PASSWORD", "ApiError", "CinderApi", "GlanceApi", "Rig", "RigError", "ServedRequest"]

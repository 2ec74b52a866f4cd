"""cinder_service.py CONF FD LIFELINE_FD REQUEST_LOG: all of Cinder in one process, its API on the listening socket FD.

Runs inside `.venvs/glance`: cinder-api, cinder-scheduler and a cinder-volume for each backend, over oslo.messaging's
in-process transport, so that no broker is needed. The lifeline is as wsgi_run.py's.

In eventlet mode, Cinder's default: in native threads (experimental in Cinder 29) the second download of an image hangs
and sqlite says "database is locked".
"""

import sys

from tools.rig.request_log import end_with, recorded

end_with(int(sys.argv[3]))  # before the patching, which would make its thread a green one that blocks all others

from cinder import monkey_patch  # noqa: E402

monkey_patch.patch()

import os  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
from typing import Any  # noqa: E402

import eventlet  # noqa: E402
import os_brick  # noqa: E402
from cinder import coordination, objects, rpc, service, version  # noqa: E402
from cinder.cmd import volume as _volume_options  # noqa: E402, F401 (registers its options)
from cinder.common import config, constants  # noqa: E402
from oslo_config import cfg  # noqa: E402
from oslo_log import log as logging  # noqa: E402
from oslo_privsep import priv_context  # noqa: E402
from oslo_service import wsgi  # noqa: E402

CONF = cfg.CONF


def start_services() -> None:
    """Start the scheduler and one volume service a backend; they live in this process's green threads."""
    services = [service.Service.create(binary="cinder-scheduler")]
    for backend in CONF.enabled_backends:
        services.append(
            service.Service.create(
                host=f"{CONF.host}@{backend}",
                service_name=backend,
                binary=constants.VOLUME_BINARY,
                coordination=False,
            )
        )
    for one in services:
        one.start()


def main() -> None:
    conf_path, listen_fd, _, request_log = sys.argv[1:5]
    objects.register_all()
    CONF(["--config-file", conf_path], project="cinder", version=version.version_string())
    config.set_middleware_defaults()
    logging.setup(CONF, "cinder")
    priv_context.init(root_helper=[])
    os_brick.setup(CONF)
    coordination.COORDINATOR.start()
    rpc.init(CONF)
    application: Any = recorded(wsgi.Loader(CONF).load_app("osapi_volume"), request_log)
    start_services()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    listening = socket.socket(fileno=int(listen_fd))
    eventlet.wsgi.server(listening, application, log_output=False, max_size=100)


main()

"""python -m tools.rig up|upload|down DIRECTORY ...: services that stay until they are told to end."""

import argparse
import json
import os
import signal

from tools.rig.api import GlanceApi
from tools.rig.identity import Keystone
from tools.rig.leftovers import release
from tools.rig.rig import Rig, wait_until_gone


def up(options: argparse.Namespace) -> None:
    """Start a rig, leave it running, and write what is needed to use and to end it."""
    rig = Rig(
        options.directory,
        auth=options.auth,
        http_store=not options.no_http_store,
        cinder=options.cinder,
        nfs=options.nfs,
        token_expiration_s=options.token_expiration_s,
        host=options.host,
        detached=True,
    )
    rig.start()
    state = {"glance_url": rig.glance_url, "pids": rig.pids, "conf_lines": rig.conf_lines()}
    if options.auth == "keystone":
        state["keystone_url"] = rig.keystone_url
    with open(os.path.join(rig.directory, "rig.json"), "w", encoding="utf-8") as out:
        json.dump(state, out)
    print(rig.conf_lines(), end="")


def upload(options: argparse.Namespace) -> None:
    """Make a public image of a file in the rig that `up` left running; prints its id."""
    with open(os.path.join(options.directory, "rig.json"), encoding="utf-8") as written:
        state = json.load(written)
    token = Keystone(state["keystone_url"]).token() if "keystone_url" in state else None
    name = os.path.basename(options.file)
    glance = GlanceApi(state["glance_url"], token)
    print(glance.upload(options.file, name, options.disk_format, store=options.store, visibility="public"))


def down(options: argparse.Namespace) -> None:
    """End the rig that `up` left running."""
    path = os.path.join(options.directory, "rig.json")
    with open(path, encoding="utf-8") as state:
        pids = json.load(state)["pids"]
    for pid in pids.values():
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(pid, signum)
            except ProcessLookupError:
                break
            if wait_until_gone(pid, 3.0):
                break
    release(os.path.abspath(options.directory))
    os.unlink(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.rig", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("up", help=up.__doc__)
    command.set_defaults(run=up)
    command.add_argument("directory")
    command.add_argument("--auth", choices=["fake", "keystone"], default="fake")
    command.add_argument("--no-http-store", action="store_true")
    command.add_argument("--cinder", action="store_true", help="a Cinder too, and stores in it; needs root")
    command.add_argument("--nfs", action="store_true", help="a Cinder that has a backend on the NFS driver too")
    command.add_argument("--token-expiration-s", type=int, default=3600)
    command.add_argument("--host", default="127.0.0.1")
    command = commands.add_parser("upload", help=upload.__doc__)
    command.set_defaults(run=upload)
    command.add_argument("directory")
    command.add_argument("file")
    command.add_argument("--disk-format", choices=["raw", "qcow2"], default="raw")
    command.add_argument("--store", default="fs", help="fs; with --cinder multi or plain, with --nfs nfs")
    command = commands.add_parser("down", help=down.__doc__)
    command.set_defaults(run=down)
    command.add_argument("directory")
    options = parser.parse_args()
    options.run(options)


main()

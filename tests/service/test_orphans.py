"""A server whose keeper died before it could ask to die with it: it must not stay, for it holds the cache's lock."""

import json
import os
import socket
import subprocess
import sys


def test_a_server_that_comes_up_after_its_keeper_has_died_ends_before_it_loads_anything() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # As the kernel shows it: whose child we are by then is not the keeper.
    arguments = {"keeper_pid": os.getppid(), "keeper_fd": theirs.fileno()}
    command = [sys.executable, "-P", "-m", "basefs.service", json.dumps(arguments)]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE) as server:
        theirs.close()
        ours.settimeout(60)
        assert ours.recv(1000) == b"", "it said something"
        assert server.stderr is not None
        assert (server.wait(60), server.stderr.read()) == (1, b"")

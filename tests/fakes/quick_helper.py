"""A helper process without os-brick, for local devices: it starts in no time and misbehaves as a file tells it.

    python tests/fakes/quick_helper.py BEHAVIOUR_FILE FD LOCK_PATH

The file has one word for a kind of request, as in {"connect": "hang"}: `hang`, `die`, `error`, `late` (done, then
hangs), `garbage`, `unasked` (an answer without a device). It is read at each request, and the word is used up.
"""

import json
import os
import signal
import socket
import sys
import time


def main() -> None:
    with socket.socket(fileno=int(sys.argv[2])) as server:
        while True:
            data, fds, _flags, _address = socket.recv_fds(server, 65536, 1)
            if not data:
                return
            kind = json.loads(data)["do"]
            word = behaviour_of(kind)
            if word == "hang":
                time.sleep(3600)
            elif word == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            answer, fd = answer_to(kind, fds)
            if word == "late":
                time.sleep(3600)
            elif word == "error":
                answer, fd = {"error": "ProcessExecutionError: told to fail, 'auth_password': '***'"}, None
            elif word == "unasked":
                fd = None
            said = b"\x00 no JSON" if word == "garbage" else json.dumps(answer).encode()
            socket.send_fds(server, [said], [] if fd is None else [fd])
            for one in [*fds, *([] if fd is None else [fd])]:
                os.close(one)


def behaviour_of(kind: str) -> str | None:
    with open(sys.argv[1], encoding="utf-8") as file:
        words = json.load(file)
    word = words.pop(kind, None)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(words, file)
    return word


def answer_to(kind: str, fds: list[int]) -> tuple[dict[str, object], int | None]:
    if kind == "properties":
        return {"properties": {"host": "node", "ip": "127.0.0.1", "platform": "x86_64", "os_type": "linux"}}, None
    if kind == "disconnect":
        return {"disconnected": True}, None
    path = json.loads(os.pread(fds[0], 65536, 0))["connection_info"]["device_path"]
    info = {"type": "local", "path": path}
    return {"device": path, "device_info": info}, os.open(path, os.O_RDONLY)


if __name__ == "__main__":
    main()

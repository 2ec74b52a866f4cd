"""delay_proxy.py HOST PORT ONE_WAY_S: a TCP proxy that holds back each byte so long in each direction; ends with stdin.

Its rate is not limited. A process of its own: the kernel has no netem here, and threads of the benchmark would wait for
each other. Prints the port that it listens on.
"""

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

from tools.mount import ROOT

READ_BYTES = 256 * 1024


@contextlib.contextmanager
def delayed(url: str, one_way_s: float) -> Iterator[str]:
    """Yield a URL whose server is that of `url`, 2 * `one_way_s` of round trip away."""
    parts = urlsplit(url)
    argv = [sys.executable, "-m", "tools.bench.delay_proxy", str(parts.hostname), str(parts.port), str(one_way_s)]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdin is not None
        assert proxy.stdout is not None
        try:
            yield f"{parts.scheme}://127.0.0.1:{int(proxy.stdout.readline())}{parts.path}"
        finally:
            proxy.stdin.close()


async def _hold_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one_way_s: float) -> None:
    """Ends with the connection."""
    loop = asyncio.get_running_loop()
    on_their_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def arrive() -> None:
        while True:
            due, data = await on_their_way.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    arriving = asyncio.create_task(arrive())
    with contextlib.suppress(ConnectionError):
        data = b"the first"
        while data:
            data = await reader.read(READ_BYTES)
            on_their_way.put_nowait((loop.time() + one_way_s, data))
        await arriving
    arriving.cancel()
    writer.close()


async def _serve(host: str, port: int, one_way_s: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, port)
        await asyncio.gather(_hold_back(reader, back, one_way_s), _hold_back(there, writer, one_way_s))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(ended.set)), daemon=True).start()
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))

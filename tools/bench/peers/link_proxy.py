"""link_proxy.py HOST PORT ROUND_TRIP_S BITS_S: a TCP proxy that delays and limits as a link does (BITS_S 0: no limit).

Says `{"port": N}` on standard output, then the counters for every line on standard input, and ends with that.

In user space because the kernels of test machines lack netem. Both directions are modelled (`link_model.py`); the
handshake costs its round trip; at most WINDOW_BYTES of a connection are in flight. What is not modelled is TCP's slow
start, which would cost everybody some round trips more. Timing is select(2)'s, to the microsecond: epoll rounds up to
milliseconds, which would be a fifth of a round trip of 10 ms.
"""

import collections
import contextlib
import heapq
import itertools
import json
import os
import select
import socket
import sys
import time

from tools.bench.peers.link_model import Direction, LinkSpec

WINDOW_BYTES = 6 << 20
"""net.ipv4.tcp_rmem's default maximum: what one connection has in flight at most."""
BACKLOG_S = 0.02
"""The queue before the link: as much as a router's would hold, so that connections share the rate."""
REALTIME_PRIORITY = 1
HEAD_END = b"\r\n\r\n"


class Counters:
    """What has crossed the link since the start."""

    def __init__(self) -> None:
        self.down_bytes = 0
        self.up_bytes = 0
        self.requests = 0

    def as_json(self) -> str:
        """All of them, on one line."""
        return json.dumps(vars(self))


class Flow:
    """The bytes of one connection in one direction: read from `source`, due later, written to `sink`."""

    def __init__(self, source: socket.socket, sink: socket.socket, direction: Direction, first_s: float) -> None:
        self.source = source
        self.sink = sink
        self.direction = direction
        self.first_s = first_s
        self.queue: collections.deque[tuple[float, memoryview]] = collections.deque()
        self.queued_bytes = 0
        self.is_held = False  # the link's queue is full
        self.is_read = False  # the source is at its end
        self.is_ended = False  # and the sink knows
        self.is_blocked = False  # the sink takes no more
        self.tail = b""

    @property
    def wants_bytes(self) -> bool:
        """Whether more is to be read from the source now."""
        return not (self.is_held or self.is_read) and self.queued_bytes <= WINDOW_BYTES


class Proxy:
    """The loop: accepts, reads what the link has room for, delivers what is due."""

    def __init__(self, target: tuple[str, int], link: LinkSpec) -> None:
        self._target = target
        self._link = link
        self._up, self._down = (Direction(delay_s=link.round_trip_s / 2, bits_s=link.bits_s) for _ in range(2))
        self._flows: dict[int, tuple[Flow, Flow]] = {}
        self._held: collections.deque[Flow] = collections.deque()
        self._deaf: set[int] = set()
        self._due: list[tuple[float, int, Flow]] = []
        self._numbers = itertools.count()
        self._epoll = select.epoll()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listening.setblocking(False)
        self.port: int = self._listening.getsockname()[1]
        self.counters = Counters()

    def run(self, control_fd: int) -> None:
        """Serve until `control_fd` is at its end."""
        self._epoll.register(self._listening, select.EPOLLIN)
        self._epoll.register(control_fd, select.EPOLLIN)
        while True:
            select.select([self._epoll], [], [], self._pause_s(time.monotonic()))
            for fd, events in self._epoll.poll(0):
                if fd == control_fd:
                    if not os.read(fd, 4096):
                        return
                    print(self.counters.as_json(), flush=True)
                elif fd == self._listening.fileno():
                    self._accept()
                elif fd in self._flows:
                    self._serve(fd, events)
            self._advance()

    def _pause_s(self, now: float) -> float | None:
        """How long nothing happens unless a socket wakes us; None: for ever."""
        ends = [self._due[0][0] - now] if self._due else []
        ends += [self._held[0].direction.backlog_s(now) - BACKLOG_S] if self._held else []
        return max(0.0, min(ends)) if ends else None

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            client, _ = self._listening.accept()
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                return
            for one in (client, server):
                one.setblocking(False)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # The kernel has shaken hands with the client already; over the link it would take a round trip.
            shaken = time.monotonic() + self._link.round_trip_s
            up, down = Flow(client, server, self._up, shaken), Flow(server, client, self._down, 0.0)
            self._flows[client.fileno()] = (up, down)
            self._flows[server.fileno()] = (down, up)
            for one in (client, server):
                self._epoll.register(one, select.EPOLLIN)

    def _serve(self, fd: int, events: int) -> None:
        outgoing, incoming = self._flows[fd]
        if events & select.EPOLLOUT:
            self._deliver(incoming, time.monotonic())
        if events & select.EPOLLIN and fd in self._flows:
            self._read(outgoing)
        elif events & (select.EPOLLERR | select.EPOLLHUP) and fd in self._flows:
            if events & select.EPOLLERR or not outgoing.is_read:
                self._close(outgoing)
            else:  # gone both ways; what it sent is still on the link
                self._epoll.unregister(fd)
                self._deaf.add(fd)
                incoming.is_ended = True

    def _read(self, flow: Flow) -> None:
        now = time.monotonic()
        if flow.direction.backlog_s(now) > BACKLOG_S:
            flow.is_held = True
            self._held.append(flow)
            self._watch(flow.source)
            return
        try:
            data = flow.source.recv(self._link.piece_bytes)
        except BlockingIOError:
            return
        except OSError:
            self._close(flow)
            return
        if flow.direction is self._up:
            self._count_up(flow, data)
        flow.is_read = not data
        flow.queue.append((flow.direction.arrival(max(now, flow.first_s), len(data)), memoryview(data)))
        flow.queued_bytes += len(data)
        if not flow.wants_bytes:
            self._watch(flow.source)
        if len(flow.queue) == 1:
            self._deliver(flow, now)

    def _count_up(self, flow: Flow, data: bytes) -> None:
        self.counters.up_bytes += len(data)
        searched = flow.tail + data
        self.counters.requests += searched.count(HEAD_END)  # of GET and HEAD, which have no body
        flow.tail = searched[-3:]

    def _advance(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            self._deliver(heapq.heappop(self._due)[2], now)
        while self._held and self._held[0].direction.backlog_s(now) <= BACKLOG_S:
            flow = self._held.popleft()
            flow.is_held = False
            if flow.source.fileno() in self._flows:
                self._read(flow)
                self._watch(flow.source)

    def _deliver(self, flow: Flow, now: float) -> None:
        """Write what is due; what is not gets its alarm, what the receiver does not take waits for it."""
        was_blocked, flow.is_blocked = flow.is_blocked, False
        wanted_bytes = flow.wants_bytes
        while flow.queue and not flow.is_blocked:
            due, data = flow.queue[0]
            if due > now:
                heapq.heappush(self._due, (due, next(self._numbers), flow))
                break
            if not data:
                self._end(flow)
                return
            try:
                self._sent(flow, flow.sink.send(data))
            except BlockingIOError:
                flow.is_blocked = True
            except OSError:
                self._close(flow)
                return
        if was_blocked != flow.is_blocked:
            self._watch(flow.sink)
        if wanted_bytes != flow.wants_bytes:
            self._watch(flow.source)

    def _sent(self, flow: Flow, size: int) -> None:
        due, data = flow.queue.popleft()
        if size < len(data):
            flow.queue.appendleft((due, data[size:]))
        flow.queued_bytes -= size
        if flow.direction is self._down:
            self.counters.down_bytes += size

    def _watch(self, one: socket.socket) -> None:
        """Tell the kernel what we wait for: bytes if somebody takes them, room if somebody has bytes for it."""
        fd = one.fileno()
        if fd in self._flows and fd not in self._deaf:
            outgoing, incoming = self._flows[fd]
            wanted = select.EPOLLIN if outgoing.wants_bytes else 0
            self._epoll.modify(fd, wanted | (select.EPOLLOUT if incoming.is_blocked else 0))

    def _end(self, flow: Flow) -> None:
        """The source's end has arrived."""
        flow.queue.clear()
        flow.is_ended = True
        if self._flows[flow.source.fileno()][1].is_ended:
            self._close(flow)
            return
        with contextlib.suppress(OSError):
            flow.sink.shutdown(socket.SHUT_WR)

    def _close(self, flow: Flow) -> None:
        """Both directions at once; what was on its way is lost."""
        for one in (flow.source, flow.sink):
            fd = one.fileno()
            if flows := self._flows.pop(fd, None):
                flows[0].queue.clear()
                if fd not in self._deaf:
                    self._epoll.unregister(fd)
                self._deaf.discard(fd)
                one.close()


def main() -> None:
    host, port, round_trip_s, bits_s = sys.argv[1:]
    link = LinkSpec(name="", round_trip_s=float(round_trip_s), bits_s=float(bits_s) or None)
    if link.round_trip_s or link.bits_s:
        with contextlib.suppress(PermissionError):  # a link does not wait for a processor
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REALTIME_PRIORITY))
    proxy = Proxy((host, int(port)), link)
    print(json.dumps({"port": proxy.port}), flush=True)
    proxy.run(sys.stdin.fileno())


if __name__ == "__main__":
    main()

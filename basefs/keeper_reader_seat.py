"""One place for a reader, whoever has it now: the process, its pings, its connection to the server. Stdlib only."""

import contextlib
import socket

from basefs.keeper_reader_process import Place, ReaderProcess
from basefs.keeper_watchdog import Watchdog
from basefs.server_process import END_LIMIT_S


class Seat:
    """One place, its reader if there is one, and when the next is started (None: not before it is wanted)."""

    def __init__(self, number: int, place: Place) -> None:
        self.number = number
        self.place = place
        self.reader: ReaderProcess | None = None
        self.watchdog = Watchdog()
        self.next_s: float | None = None
        self.end_by_s: float | None = None
        """When a reader that was asked to end is killed."""
        self.started_s = 0.0
        self.quick_deaths = 0
        self.server_end: socket.socket | None = None
        """The server's end of the connection, to cut it."""

    def cut(self) -> None:
        """Nothing goes from this reader to its server any more, whatever that one does."""
        end, self.server_end = self.server_end, None
        if end is not None:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def stop(self, now_s: float) -> None:
        """Have the reader end when it has handed on what it took."""
        if self.reader is not None and self.end_by_s is None:
            self.watchdog.end()
            self.end_by_s = now_s + END_LIMIT_S
            self.reader.send({"type": "stop"})

    def due_s(self) -> float | None:
        """When `Readers.on_time` has something to do here."""
        times = (self.next_s, self.end_by_s, self.watchdog.due_s)
        return min((time_s for time_s in times if time_s is not None), default=None)

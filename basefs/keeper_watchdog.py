"""Whether the server still answers. Pure: no clock."""

TICKS = 4
"""Pings in a row without an answer that make a server a hung one."""


class Watchdog:
    """Counts pings that were not answered: those of our own ticks, never seconds.

    A keeper that was stopped itself (SIGSTOP, a paused machine) finds one tick late, not a server that was silent for
    hours; what the server answered meanwhile is read before the next tick.
    """

    def __init__(self) -> None:
        self.limit_s = 0.0
        self._sent = 0
        self._answered = 0
        self._unanswered = 0
        self.due_s: float | None = None
        """When to call `tick` next (time.monotonic()); None while no server is watched."""

    def begin(self, now_s: float, limit_s: float) -> None:
        """Watch a server that has just begun to serve."""
        self.limit_s = limit_s
        self._sent = self._answered = self._unanswered = 0
        self.due_s = now_s + self.limit_s / TICKS

    def end(self) -> None:
        """Watch none."""
        self.due_s = None

    def tick(self, now_s: float) -> int | None:
        """The number of the ping to send now; None if the server hangs."""
        self._unanswered = 0 if self._answered >= self._sent else self._unanswered + 1
        if self._unanswered >= TICKS:
            return None
        self._sent += 1
        self.due_s = now_s + self.limit_s / TICKS
        return self._sent

    def pong(self, number: object) -> None:
        """The server answered ping `number`."""
        if isinstance(number, int) and number <= self._sent:
            self._answered = max(self._answered, number)

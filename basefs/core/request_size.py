"""How many bytes one request of background work asks for. Pure: times are handed in.

A request costs Glance 7-8 ms of its processor and a MiB 0.35 ms (file store, gunicorn), so small ones carry a third of
what it can give, whoever asks; and a large one takes the link from a reader who comes meanwhile. So: what comes within
REQUEST_S. Measured with curl, 512 MiB, two requests in flight, MiB/s (one plain GET: 580-1,020):

    4 MiB   294-325        16 MiB   569-707        32 MiB   730-741        64 MiB   976-1,123

At 50 Mbit/s two of 4 MiB keep a reader waiting for 1.3 s, two of 1 MiB for 0.3 s; they cost Glance a thirtieth more of
the time in which they come.
"""

MIB = 1 << 20
BYTES_MIN, BYTES_MAX = MIB, 64 * MIB
BYTES_FIRST = 4 * MIB
"""Before anything came."""
REQUEST_S = 0.2
FAST_BYTES_S = 160 * MIB
"""Two requests in flight that come so fast keep a processor busy on either side."""


class RequestSize:
    """`bytes` follows the rate at which the last requests came."""

    def __init__(self) -> None:
        self._bytes_s = BYTES_FIRST / REQUEST_S

    @property
    def bytes(self) -> int:
        """Whole MiB: BYTES_MIN to BYTES_MAX."""
        wanted = int(self._bytes_s * REQUEST_S) // MIB * MIB
        return min(max(wanted, BYTES_MIN), BYTES_MAX)

    @property
    def is_fast(self) -> bool:
        """Whether the last requests came at FAST_BYTES_S or more."""
        return self._bytes_s >= FAST_BYTES_S

    def came(self, length: int, seconds: float) -> None:
        """So many bytes of a body, > 0, came within so many seconds, > 0. The last request counts for half.

        A rate that asks for more than BYTES_MAX counts as no more, or one burst out of a buffer would outweigh the
        slow requests after it.
        """
        rate = min(length / seconds, BYTES_MAX / REQUEST_S)
        self._bytes_s = (self._bytes_s + rate) / 2

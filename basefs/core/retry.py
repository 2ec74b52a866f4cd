"""How long to wait before the next try."""


def backoff_s(attempt: int, *, base_s: float, cap_s: float, jitter: float) -> float:
    """Seconds before try `attempt` + 1 (attempt >= 1): exponential, capped, and spread by `jitter`.

    `jitter` in [0, 1) comes from the caller's random source; the answer lies in [half, full] of the
    exponential step, so that a thousand nodes that lost Glance together do not come back together.
    """
    step_s = min(cap_s, base_s * 2.0 ** min(attempt - 1, 30))
    return step_s * (0.5 + 0.5 * jitter)

"""What the measured parts say of fleets that no machine here can hold; docs/SCALE.md says what that leaves out.

What Glance and the tier, or a store, send and compute is taken to be linear in the number of nodes: a part that is
there once, and a part for each node, from the smallest and the largest number measured. The last node is done when the
slowest of these is: one node alone, Glance's processes or its link, the tier's or the store's processors, or its link.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tools.bench.fleet.record import FleetResults, FleetRun

NODES = (20, 100, 1000)
MB = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What a fleet stands in front of; one Glance process is one core of the machine that was measured on."""

    glance_processes: int = 8
    tier_processors: int = 8
    link_bits_s: float = 10e9
    """Of Glance, and of the tier or of the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Seconds until the last of `nodes` is done, and what makes it so long."""

    way: str
    nodes: int
    last_s: float
    bound_by: str
    glance_bytes: float
    glance_requests: float


def expected(small: FleetRun, large: FleetRun, nodes: int, site: Site) -> Expected:
    """Of `nodes` by the way that both runs were measured on; `small.nodes < large.nodes`."""

    def of(figure: Callable[[FleetRun], float]) -> float:
        each = max(0.0, (figure(large) - figure(small)) / (large.nodes - small.nodes))
        return max(0.0, figure(large) + each * (nodes - large.nodes))

    seconds = {
        "one node's own time": small.last_s,
        "Glance's processes": of(lambda run: run.glance_cpu_s) / site.glance_processes,
        "Glance's link": of(lambda run: run.glance_bytes) * 8 / site.link_bits_s,
        "the other's processors": of(lambda run: run.other_cpu_s) / site.tier_processors,
        "the other's link": of(lambda run: run.other_bytes) * 8 / site.link_bits_s,
    }
    bound_by = max(seconds, key=lambda name: seconds[name])
    return Expected(
        way=small.way,
        nodes=nodes,
        last_s=seconds[bound_by],
        bound_by=bound_by,
        glance_bytes=of(lambda run: run.glance_bytes),
        glance_requests=of(lambda run: run.glance_requests),
    )


def table(results: FleetResults, site: Site | None = None) -> str:
    """The model's answers as text, for each way that was measured with two numbers of nodes at least."""
    site = site or Site()
    processors = f"{site.glance_processes} Glance processes, {site.tier_processors} processors of the tier or store"
    lines = [f"model: {processors}, {site.link_bits_s / 1e9:.0f} Gbit/s to each"]
    for way in dict.fromkeys(run.way for run in results.runs):
        runs = sorted((run for run in results.runs if run.way == way), key=lambda run: run.nodes)
        for nodes in NODES if len(runs) > 1 else ():
            one = expected(runs[0], runs[-1], nodes, site)
            lines.append(
                f"{way:20} {nodes:5} nodes: last after {one.last_s:7.1f} s ({one.bound_by}); Glance sends "
                f"{one.glance_bytes / MB:,.0f} MB in {one.glance_requests:,.0f} requests"
            )
    return "\n".join(lines)

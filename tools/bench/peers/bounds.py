"""What issue 6 asks for, of the results: figures with bounds, as the other benches have them."""

from tools.bench.cached import DIRECT
from tools.bench.peers import work_cached, work_guest, work_trace
from tools.bench.peers.record import Results, median_of
from tools.bench.report import Report

OURS, TRACED, TWO_READERS, LIMIT = "basefs", "basefs trace", "basefs 2 readers", "local file"
GUESTS_BYTES_MAX = 1.1
"""No two boots read the same: of each other's 710 units of 64 KiB 2 to 6 differ (docs/DESIGN.md, Boot traces)."""
NO_OPERATORS_CHOICE = (OURS, TRACED, TWO_READERS, LIMIT, "basefs qcow2", work_cached.CURL)


def judge(report: Report, results: Results) -> None:
    """Add a figure for each bound whose works were measured."""
    report.part("peers", "bounds of issue 6, of the medians above")
    _cold_guest(report, results)
    _trace_known(report, results)
    _cached(report, results)
    _many(report, results)
    _many_guests(report, results)
    _whole(report, results)


def _others(results: Results) -> list[str]:
    return [peer for peer in results.peers() if peer not in NO_OPERATORS_CHOICE]


def _at_most(report: Report, results: Results, name: str, cell: tuple[str, str], other: str, bound: float) -> None:
    """Our value over another's of the same cell, if both were measured."""
    ratio = results.ratio(*cell, OURS, other)
    if ratio is not None:
        report.at_most(name, ratio, bound)


def _cold_guest(report: Report, results: Results) -> None:
    cell = (work_guest.COLD, "1 Gbit/s, 10 ms")
    _at_most(report, results, "cold guest, no trace, 1 Gbit/s + 10 ms: seconds / local file's", cell, LIMIT, 1.5)
    for peer in _others(results):
        _at_most(report, results, f"  seconds / those of {peer}", cell, peer, 1.0)


def _trace_known(report: Report, results: Results) -> None:
    for link in ("loopback", "1 Gbit/s"):
        ratio = results.ratio(work_guest.COLD, link, TRACED, LIMIT)
        if ratio is not None:
            report.at_most(f"cold guest, trace known, {link}: seconds / local file's", ratio, 1.05)
        fetched = median_of(results.of(work_guest.COLD, link, TRACED), "fetched_bytes")
        if fetched and results.guest_distinct_bytes:
            report.at_most("  bytes fetched / distinct 64 KiB ranges", fetched / results.guest_distinct_bytes, 1.1)
    cell = (work_trace.COLD, "1 Gbit/s, 10 ms")
    runs = results.of(*cell, TRACED)
    ratio, fetched = results.ratio(*cell, TRACED, OURS), median_of(runs, "fetched_bytes")
    if ratio is not None:
        report.at_most("trace replayed cold, trace known, 10 ms: seconds / without", ratio, 0.5)
    if fetched:
        report.at_most("  bytes fetched / distinct 64 KiB ranges", fetched / results.distinct_bytes, 1.1)
        report.at_most("  requests (why not 12: Boot traces, above)", median_of(runs, "requests") or 0, 120)


def _cached(report: Report, results: Results) -> None:
    for workload in DIRECT:
        cell = (work_cached.name(workload.name), "loopback")
        for peer in ("rclone", "nbdkit"):
            ratio = results.ratio(*cell, OURS, peer)
            if ratio is not None and not workload.is_throughput:
                report.at_least(f"{workload.name}, cached: IOPS / those of {peer}", ratio, 1.0)
        best = max(_others(results), key=lambda peer: results.median(*cell, peer) or 0.0, default=None)
        if workload.is_throughput and best is not None:
            name = f"{workload.name}, cached: bytes / those of the best peer ({best})"
            for ours, told in ((OURS, name), (TWO_READERS, "  with two readers, of which the issue speaks")):
                ratio = results.ratio(*cell, ours, best)
                if ratio is not None:
                    report.at_least(told, ratio, 2.0)


def _many(report: Report, results: Results) -> None:
    work = work_trace.many_name(32, different=False)
    cell = (work, "1 Gbit/s")
    one = [run.fetched_bytes for run in results.of(work_trace.COLD, "1 Gbit/s", OURS) if run.fetched_bytes]
    many = [run.fetched_bytes for run in results.of(*cell, OURS) if run.fetched_bytes]
    if one and many:
        ratio = max(many) / max(one)
        report.at_most("32 traces of one disk at once, cold: bytes fetched / those of one", ratio, 1.05)
    _at_most(report, results, "  seconds of the last / local file's", cell, LIMIT, 1.2)


def _many_guests(report: Report, results: Results) -> None:
    cell = (work_guest.many_name(different=False), "1 Gbit/s")
    alone = median_of(results.of(work_guest.COLD, "1 Gbit/s, 10 ms", OURS), "fetched_bytes")
    together = median_of(results.of(*cell, OURS), "fetched_bytes")
    if alone and together:
        name = f"{work_guest.AT_ONCE} guests of one disk at once, cold: bytes fetched / those of one"
        report.at_most(name, together / alone, GUESTS_BYTES_MAX)
    for peer in (OURS, TRACED):
        ratio = results.ratio(*cell, peer, LIMIT)
        if ratio is not None:
            report.at_most(f"  seconds of the last, {peer} / local file's", ratio, 1.2)


def _whole(report: Report, results: Results) -> None:
    ratio = results.ratio(work_cached.WHOLE, "loopback", OURS, work_cached.CURL)
    if ratio is not None:
        report.at_least("read from end to end, cold, loopback: rate / curl's to a file", ratio, 0.8)

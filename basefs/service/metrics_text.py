"""Samples as the text that Prometheus reads. The one module that knows prometheus_client; imported late."""

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from basefs.core.histogram import DURATION_BOUNDS_S, DurationHistogram
from basefs.service.metrics_table import METRICS, Metric, Sample

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = [*(f"{bound:g}" for bound in DURATION_BOUNDS_S), "+Inf"]


def metrics_text(samples: Iterable[Sample]) -> bytes:
    """What `GET /metrics` answers. Reads this process's figures from /proc, so it belongs in a thread."""
    registry = CollectorRegistry()
    registry.register(_Samples([("basefs_build_info", _build(), 1.0), *samples]))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


def _build() -> tuple[str, str, str]:
    return version("basefs"), ".".join(map(str, sys.version_info[:3])), platform.release()


class _Samples(Collector):
    """The samples by metric, in the order of the table; metrics without a sample, too."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._families = {metric.name: _family_of(metric) for metric in METRICS.values()}
        for name, labels, value in samples:
            _add(self._families[name], labels, value)

    def collect(self) -> Iterable[Family]:
        """See `Collector`."""
        return self._families.values()


def _family_of(metric: Metric) -> Family:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    family: Family = kinds[metric.kind](metric.name, metric.help, labels=metric.labels)
    return family


def _add(family: Family, labels: tuple[str, ...], value: float | DurationHistogram) -> None:
    if isinstance(family, HistogramMetricFamily):
        assert isinstance(value, DurationHistogram), family.name
        counts = accumulate(float(count) for count in value.counts)
        family.add_metric(labels, list(zip(_BOUNDS, counts, strict=True)), value.sum_s)
    else:
        assert not isinstance(value, DurationHistogram), family.name
        family.add_metric(labels, float(value))

"""Writes the Grafana dashboard: `python -m tools.monitoring.dashboard`. A test compares the file with this."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "basefs-dashboard.json"
SCHEMA_VERSION = 39
"""Of Grafana 10 and 11; later ones convert it."""
COLUMNS = 24
WIDTH, HEIGHT = 6, 7
STAT_WIDTH, STAT_HEIGHT = 3, 4
SELECTOR = 'instance=~"$instance"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel: PromQL expressions with their legends, where `@` stands for the chosen instances."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    red_from: float | None = None


def _quantile(quantile: str, label: str, series: str) -> str:
    return f"histogram_quantile({quantile}, sum by ({label}, le) (rate(basefs_{series}[5m])))"


STATS = (
    Panel(title="Serving", queries=(("min(basefs_serving{@})", ""),), kind="stat"),
    Panel(title="Glance, Keystone away", queries=(("sum(basefs_endpoint_away{@})", ""),), kind="stat", red_from=1),
    Panel(title="Hung reads", queries=(("sum(basefs_hung_reads{@})", ""),), kind="stat", red_from=1),
    Panel(
        title="EIO answered, 1 h",
        queries=(('sum(increase(basefs_fuse_errors_total{errno="EIO",@}[1h]))', ""),),
        kind="stat",
        red_from=1,
    ),
    Panel(
        title="Restarts, 24 h",
        queries=(("sum(increase(basefs_server_restarts_total{@}[24h]))", ""),),
        kind="stat",
        red_from=3,
    ),
    Panel(
        title="Damaged chunks, 24 h",
        queries=(("sum(increase(basefs_cache_damaged_chunks_total{@}[24h]))", ""),),
        kind="stat",
        red_from=1,
    ),
    Panel(
        title="Images quarantined",
        queries=(('sum(basefs_images{what="quarantined",@})', ""),),
        kind="stat",
        red_from=1,
    ),
    Panel(title="Cache used", queries=(("sum(basefs_cache_used_bytes{@})", ""),), kind="stat", unit="bytes"),
)
GRAPHS = (
    Panel(
        title="Reads of images",
        queries=(
            ("sum(rate(basefs_cache_hits_total{@}[5m]))", "answered at once"),
            ("sum(rate(basefs_cache_misses_total{@}[5m]))", "waited"),
        ),
        unit="reqps",
    ),
    Panel(
        title="Bytes",
        queries=(
            ("sum(rate(basefs_cache_hit_bytes_total{@}[5m]))", "from the cache"),
            ("sum(rate(basefs_glance_received_bytes_total{@}[5m]))", "from Glance"),
            ("sum(rate(basefs_hydrated_bytes_total{@}[5m]))", "of these to complete images in use"),
        ),
        unit="Bps",
    ),
    Panel(
        title="Time to the answer, 99 of 100",
        queries=(
            (
                _quantile(
                    "0.99", "operation", 'fuse_request_duration_seconds_bucket{operation=~"read|lookup|open|getattr",@}'
                ),
                "{{operation}}",
            ),
        ),
        unit="s",
    ),
    Panel(
        title="Waiting requests",
        queries=(
            ("sum by (operation) (basefs_fuse_requests_in_flight{@})", "{{operation}}"),
            ("sum(basefs_hung_reads{@})", "reads over 10 s"),
        ),
    ),
    Panel(
        title="Requests to Glance and Keystone",
        queries=(("sum by (kind, status) (rate(basefs_glance_requests_total{@}[5m]))", "{{kind}} {{status}}"),),
        unit="reqps",
    ),
    Panel(
        title="Glance: time to the answer, 90 of 100",
        queries=((_quantile("0.9", "kind", "glance_request_duration_seconds_bucket{@}"), "{{kind}}"),),
        unit="s",
    ),
    Panel(
        title="Errors answered",
        queries=(
            (
                'sum by (operation, errno) (rate(basefs_fuse_errors_total{errno!="ENOENT",@}[5m]))',
                "{{operation}} {{errno}}",
            ),
        ),
        unit="reqps",
    ),
    Panel(
        title="Restarts, and lateness of the loop",
        queries=(
            ("increase(basefs_server_restarts_total{@}[5m])", "restarts {{instance}}"),
            (_quantile("0.99", "instance", "loop_delay_seconds_bucket{@}"), "loop, s {{instance}}"),
        ),
    ),
    Panel(
        title="Cache",
        queries=(
            ("sum(basefs_cache_used_bytes{@})", "used"),
            ("sum(basefs_cache_limit_bytes{@})", "limit"),
            ("sum(basefs_cache_disk_free_bytes{@})", "free on the disk"),
        ),
        unit="bytes",
    ),
    Panel(
        title="Evictions and damage",
        queries=(
            ("sum(rate(basefs_cache_evicted_chunks_total{@}[5m]))", "chunks evicted"),
            ("sum(rate(basefs_cache_damaged_chunks_total{@}[5m]))", "damaged chunks found by reads"),
            ("sum(rate(basefs_scrub_damaged_chunks_total{@}[5m]))", "damaged chunks found by the scrub"),
            ("sum(basefs_cache_degraded{@})", "nodes with a degraded cache"),
            ("sum(basefs_cache_full{@})", "nodes with a full cache"),
        ),
    ),
    Panel(
        title="Memory and processor of the server",
        queries=(
            ('process_resident_memory_bytes{job="basefs",@}', "memory {{instance}}"),
            ('rate(process_cpu_seconds_total{job="basefs",@}[5m]) * 1e8', "CPU s/s x 1e8 {{instance}}"),
        ),
        unit="bytes",
    ),
    Panel(
        title="Images",
        queries=(
            (
                'sum by (what) (basefs_images{what=~"open|hydrating|verified|refetching|quarantined",@})',
                "{{what}}",
            ),
        ),
    ),
    Panel(
        title="Volumes behind images",
        queries=(
            ("sum by (state) (basefs_links{@})", "{{state}}"),
            ("sum(increase(basefs_link_breaks_total{@}[5m]))", "failed a read"),
            ("sum(increase(basefs_link_attach_failures_total{@}[5m]))", "not attached"),
            ("sum(increase(basefs_link_detach_failures_total{@}[5m]))", "not detached"),
        ),
    ),
    Panel(
        title="Volumes: time to attach, 90 of 100",
        queries=((_quantile("0.9", "instance", "link_attach_duration_seconds_bucket{@}"), "{{instance}}"),),
        unit="s",
    ),
    Panel(
        title="How much of each image is here",
        queries=(
            (
                "max by (image_id) (basefs_image_cached_bytes{@} / (basefs_image_size_bytes{@} > 0))",
                "{{image_id}}",
            ),
        ),
        unit="percentunit",
    ),
)


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    panels: list[dict[str, Any]] = []
    for stat in STATS:
        _place(panels, stat, STAT_WIDTH, STAT_HEIGHT)
    for graph in GRAPHS:
        _place(panels, graph, WIDTH, HEIGHT)
    return {
        "title": "basefs",
        "uid": "basefs",
        "tags": ["openstack", "nova", "glance"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_datasource(), _instance()]},
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}


def _instance() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "Node",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(basefs_build_info, instance)", "refId": "instance"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _place(panels: list[dict[str, Any]], panel: Panel, width: int, height: int) -> None:
    """Put the panel right of the last one, or below where the row is full or of another height."""
    x, y = 0, 0
    if panels:
        last = panels[-1]["gridPos"]
        x, y = last["x"] + last["w"], last["y"]
        if x + width > COLUMNS or last["h"] != height:
            x, y = 0, y + last["h"]
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red_from is not None:
        steps.append({"color": "red", "value": panel.red_from})
    panels.append(
        {
            "id": len(panels) + 1,
            "type": panel.kind,
            "title": panel.title,
            "datasource": _SOURCE,
            "gridPos": {"x": x, "y": y, "w": width, "h": height},
            "fieldConfig": {
                "defaults": {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}},
                "overrides": [],
            },
            "options": {},
            "targets": [
                {
                    "refId": chr(ord("A") + at),
                    "datasource": _SOURCE,
                    "expr": expr.replace("@", SELECTOR),
                    **_legend(text),
                }
                for at, (expr, text) in enumerate(panel.queries)
            ],
        }
    )


def _legend(text: str) -> dict[str, str]:
    return {"legendFormat": text} if text else {}


if __name__ == "__main__":
    PATH.write_text(json.dumps(dashboard(), indent=2) + "\n", encoding="utf-8")

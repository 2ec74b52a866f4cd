"""What tools/monitoring offers: Grafana takes the dashboard, Prometheus the rules, and both speak of real metrics."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from basefs.service.metrics_table import METRICS
from tests.service.promtool import promtool
from tools.monitoring.dashboard import COLUMNS, PATH, SELECTOR, dashboard

ROOT = Path(__file__).parents[2]
RULES_PATH = ROOT / "tools" / "monitoring" / "basefs-rules.yml"
RULES: list[dict[str, Any]] = yaml.safe_load(RULES_PATH.read_text())["groups"][0]["rules"]
PROCESS_METRICS = {"process_open_fds", "process_max_fds", "process_resident_memory_bytes", "process_cpu_seconds_total"}
"""Of prometheus_client, for any process; `test_metrics` has the others in a real scrape."""
SERIES = {
    f"{metric.name}{suffix}"
    for metric in METRICS.values()
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}
NODE = 'instance="n1",job="basefs"'

HISTOGRAM_SLOW = {
    f'basefs_glance_request_duration_seconds_bucket{{{NODE},kind="range",le="{le}"}}': f"0+{step}x240"
    for le, step in (("1", 1), ("2.5", 5), ("5", 10), ("+Inf", 10))
}
LOOP_SLOW = {
    f'basefs_loop_delay_seconds_bucket{{{NODE},le="{le}"}}': f"0+{step}x240"
    for le, step in (("0.25", 10), ("0.5", 15), ("+Inf", 15))
}
FIRES: dict[str, dict[str, str]] = {
    "BasefsNoMetrics": {f"up{{{NODE}}}": "0x240"},
    "BasefsServerRestarting": {f"basefs_server_restarts_total{{{NODE}}}": "0 1 2 3 4 5 6 7+0x240"},
    "BasefsKeeperGone": {f"basefs_keeper_connected{{{NODE}}}": "0x240"},
    "BasefsReadsHang": {f"basefs_hung_reads{{{NODE}}}": "3x240"},
    "BasefsAnsweredEio": {f'basefs_fuse_errors_total{{{NODE},operation="read",errno="EIO"}}': "0x10 1x240"},
    "BasefsBug": {f"basefs_bugs_total{{{NODE}}}": "0x10 1x240"},
    "BasefsGlanceAway": {f'basefs_endpoint_away{{{NODE},endpoint="glance"}}': "1x240"},
    "BasefsGlanceRefuses": {f'basefs_glance_requests_total{{{NODE},kind="auth",status="401"}}': "0+1x240"},
    "BasefsGlanceSlow": HISTOGRAM_SLOW,
    "BasefsCatalogOld": {f"basefs_catalog_refreshed_timestamp_seconds{{{NODE}}}": "0x240"},
    "BasefsDamagedChunks": {f"basefs_cache_damaged_chunks_total{{{NODE}}}": "0x10 4x240"},
    "BasefsImageQuarantined": {f'basefs_images{{{NODE},what="quarantined"}}': "0x10 1x240"},
    "BasefsCacheDegraded": {f"basefs_cache_degraded{{{NODE}}}": "1x240"},
    "BasefsCacheFull": {f"basefs_cache_full{{{NODE}}}": "1x240"},
    "BasefsVolumesFail": {f'basefs_links{{{NODE},state="broken"}}': "1x240"},
    "BasefsStoreFails": {f'basefs_store_resting{{{NODE},source="rbd",endpoint="cluster"}}': "1x240"},
    "BasefsSlowLoop": LOOP_SLOW,
    "BasefsFewFilesLeft": {f"process_open_fds{{{NODE}}}": "900x240", f"process_max_fds{{{NODE}}}": "1000x240"},
}
"""Series, a value every 15 s, that make each alert fire within 20 minutes (the catalog's: within 62)."""
QUIET = {
    f"up{{{NODE}}}": "1x300",
    f"basefs_server_restarts_total{{{NODE}}}": "7x60 8x240",  # an upgrade
    f"basefs_keeper_connected{{{NODE}}}": "1x300",
    f"basefs_hung_reads{{{NODE}}}": "0x60 1 0x240",  # one slow answer
    f'basefs_fuse_errors_total{{{NODE},operation="read",errno="EIO"}}': "3x300",
    f'basefs_fuse_errors_total{{{NODE},operation="lookup",errno="ENOENT"}}': "0+9x300",
    f"basefs_bugs_total{{{NODE}}}": "0x300",
    f'basefs_endpoint_away{{{NODE},endpoint="glance"}}': "0x60 1x4 0x240",  # Glance was restarted
    f'basefs_glance_requests_total{{{NODE},kind="range",status="206"}}': "0+50x300",
    f'basefs_glance_requests_total{{{NODE},kind="auth",status="401"}}': "0x300",
    f'basefs_glance_request_duration_seconds_bucket{{{NODE},kind="range",le="1"}}': "0+50x300",
    f'basefs_glance_request_duration_seconds_bucket{{{NODE},kind="range",le="+Inf"}}': "0+51x300",
    f"basefs_catalog_refreshed_timestamp_seconds{{{NODE}}}": "0+15x300",
    f"basefs_cache_damaged_chunks_total{{{NODE}}}": "2x300",
    f'basefs_loop_delay_seconds_bucket{{{NODE},le="0.005"}}': "0+15x300",
    f'basefs_loop_delay_seconds_bucket{{{NODE},le="+Inf"}}': "0+15x300",
    f'basefs_images{{{NODE},what="quarantined"}}': "0x300",
    f'basefs_images{{{NODE},what="refetching"}}': "0x60 1x8 0x240",
    f"basefs_cache_degraded{{{NODE}}}": "0x60 1x4 0x240",
    f"basefs_cache_full{{{NODE}}}": "0x60 1x8 0x240",
    f'basefs_links{{{NODE},state="linked"}}': "50x300",
    f'basefs_links{{{NODE},state="broken"}}': "0x60 2x8 0x240",  # the storage was restarted
    f'basefs_store_resting{{{NODE},source="rbd",endpoint="cluster"}}': "0x60 1x8 0x240",  # an OSD was restarted
    f"process_open_fds{{{NODE}}}": "100x300",
    f"process_max_fds{{{NODE}}}": "1000x300",
}


def names_of(expression: str) -> set[str]:
    """The series that an expression asks for."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}', "", re.sub(r"\b(by|without)\s*\([^)]*\)", "", expression))
    return {name for name in re.findall(r"\b[a-z_]+\b(?!\s*\()", bare) if "_" in name or name == "up"}


def says(tmp_path: Path, series: dict[str, str], alerts: list[str], at: list[str]) -> str:
    """What promtool complains of when it is told to expect none of `alerts` at the times `at`; "" if none fires."""
    test = {
        "rule_files": [str(RULES_PATH)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": [{"eval_time": time, "alertname": alert} for alert in alerts for time in at],
            }
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(test))
    try:
        promtool("test", "rules", str(path))
    except AssertionError as complaint:
        return str(complaint)
    return ""


def test_promtool_takes_the_rules() -> None:
    assert f"SUCCESS: {len(RULES)} rules found" in promtool("check", "rules", str(RULES_PATH))


def test_each_alert_has_a_test() -> None:
    assert [rule["alert"] for rule in RULES] == list(FIRES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_fires_when_it_must(rule: dict[str, Any], tmp_path: Path) -> None:
    alert = rule["alert"]
    said = says(tmp_path, FIRES[alert], [alert], ["62m" if alert == "BasefsCatalogOld" else "12m"])
    (got,) = re.findall(r"got:(.*)", said, re.DOTALL)
    assert f'alertname="{alert}"' in got
    assert 'instance="n1"' in got
    assert f'severity="{rule["labels"]["severity"]}"' in got


def test_no_alert_fires_on_an_ordinary_day(tmp_path: Path) -> None:
    assert says(tmp_path, QUIET, list(FIRES), ["12m", "15m30s", "16m", "17m", "62m", "70m"]) == ""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_the_runbook_of_an_alert_is_a_section_of_the_document(rule: dict[str, Any]) -> None:
    document, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor in anchors(ROOT / document)


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_within_the_document_leads_somewhere() -> None:
    path = ROOT / "docs" / "OPERATIONS.md"
    assert set(re.findall(r"\]\(#([^)]+)\)", path.read_text(encoding="utf-8"))) <= anchors(path)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_names_real_metrics(rule: dict[str, Any]) -> None:
    assert names_of(rule["expr"]) <= SERIES | PROCESS_METRICS | {"up"}


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_the_file_is_what_the_program_writes() -> None:
    assert json.loads(PATH.read_text(encoding="utf-8")) == dashboard()


def test_every_expression_of_the_dashboard_parses_and_names_real_metrics(tmp_path: Path) -> None:
    for expression in expressions():
        assert names_of(expression)
        assert names_of(expression) <= SERIES | PROCESS_METRICS, expression
        assert SELECTOR in expression
    rules = [
        {"record": f"panel:{at}", "expr": expression.replace("$instance", ".*")}
        for at, expression in enumerate(expressions())
    ]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(path))


def test_grafana_can_import_the_dashboard() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 36
    assert board["title"]
    assert board["uid"]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] in {"stat", "timeseries"}
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_the_panels_lie_side_by_side_on_one_screen() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= COLUMNS
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        taken |= cells
    assert max(y for _, y in taken) < 36

"""The Grafana dashboard, the Prometheus config, and what a run exports: one set of names."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import yaml

from async_rlhf.exported import EXPORTED, PREFIX, RAY_PREFIX
from tests.support.command import CHECKOUT

MONITORING = CHECKOUT / "deploy" / "monitoring"


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location("monitoring_dashboard", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script(MONITORING / "dashboard.py")
DASHBOARD = json.loads(SCRIPT.FILE.read_text(encoding="utf-8"))


def queried() -> set[str]:
    """Names in the queries, without Ray's prefix and ours."""
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    names = {name for expression in expressions for name in re.findall(rf"{RAY_PREFIX}{PREFIX}(\w+)", expression)}
    return {name.removesuffix("_bucket") for name in names}


def exported() -> set[str]:
    return {name.removeprefix(PREFIX) for name in EXPORTED}


def test_the_dashboards_file_is_what_its_table_of_panels_says():
    assert SCRIPT.FILE.read_text(encoding="utf-8") == SCRIPT.text(), "python deploy/monitoring/dashboard.py writes it anew"


def test_every_metric_of_the_dashboard_is_exported():
    assert queried() - exported() == set()


def test_every_exported_metric_is_in_the_dashboard_or_left_out_with_a_reason():
    left_out = {name for name in exported() if name.partition("_")[0] in SCRIPT.OMITTED_STAGES} | set(SCRIPT.OMITTED)

    assert exported() - queried() == left_out
    assert all([*SCRIPT.OMITTED.values(), *SCRIPT.OMITTED_STAGES.values()])


def test_panels_do_not_overlap_and_queries_of_a_panel_have_names_of_their_own():
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        assert max(x for x, _ in own) < 24
        cells |= own
        references = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(references)) == len(references)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_names_end_in_their_unit_and_none_of_them_says_total():
    """All are gauges but one: Ray gives `_total` to counters."""
    assert not [name for name in EXPORTED if name.endswith("_total")]
    assert [name for name, metric in EXPORTED.items() if metric.boundaries] == [f"{PREFIX}staleness_updates"]
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in EXPORTED)


def test_the_documentation_lists_every_exported_metric_with_its_labels_and_meaning():
    page = (CHECKOUT / "docs" / "monitoring.md").read_text(encoding="utf-8")

    for name, metric in EXPORTED.items():
        labels = ", ".join(metric.labels)
        assert f"| `{name.removeprefix(PREFIX)}` | {labels} | {metric.meaning} |" in page


def test_prometheus_is_told_where_rays_head_lists_its_nodes():
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))

    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/session_latest/prom_metrics_service_discovery.json"]

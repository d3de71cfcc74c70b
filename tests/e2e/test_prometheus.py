"""A real Prometheus scrapes a real run, and answers every query of the Grafana dashboard."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.cluster import make_model_folder
from tests.support.command import CHECKOUT, command, environment
from tests.support.http_server import free_port
from tests.support.programs import program
from tests.support.rows import numbered, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MONITORING = CHECKOUT / "deploy" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "async_rlhf.json").read_text(encoding="utf-8"))

WAIT_S = 600.0

MANY = 1_000_000
"""Updates that no test waits for: the run is stopped when it was seen."""

REWARD = """
def score(prompts, completions, **columns):
    return [len(completion) + len(set(completion)) / 100 for completion in completions]
"""

TOO_LONG = {"prompt": "1" * 60}


def prometheus_config(targets: Path) -> str:
    """The shipped one, that looks at one run, and often."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"]["scrape_interval"] = "2s"
    (job,) = config["scrape_configs"]
    del job["static_configs"]
    job["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": "1s"}]
    return yaml.safe_dump(config)


def everything(folder: Path) -> tuple[str, ...]:
    """The settings of a small run that has whatever can be measured: reward actors, a named part, a source with a bad row, a peak."""
    (folder / "reward.py").write_text(REWARD)
    rows = write_jsonl(folder / "rows.jsonl", [*numbered(0, 8), TOO_LONG])
    return (
        *("conf/quickstart.yaml", "task.name=dataset", f"model.path={make_model_folder(folder / 'model')}", "prompts.held_out=2"),
        *(f"prompts.sources.rows.path={rows}", f"reward.parts.length.function={folder / 'reward.py'}:score", "reward.count=1"),
        *("generator.engine=transformers", "batch_groups=8", "generator.max_inflight=32", "queue.ties=keep", "learner.peak_tflops=0.1"),
    )


@contextmanager
def run_at_work(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A run in that folder; ended, and looked at, in the end."""
    words = ("train", *everything(folder.parent), f"run.dir={folder}", f"updates={MANY}")
    log = folder.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(*words), cwd=CHECKOUT, env=environment(), stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 143, log.read_text()
        assert json.loads((folder / "prometheus.json").read_text()) == [], "Prometheus would go on looking for it"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def prometheus_of(run_folder: Path, folder: Path) -> Iterator[str]:
    """The address of a Prometheus that keeps in `folder` what it scrapes from the run."""
    executable = program("prometheus")
    folder.mkdir()
    (folder / "prometheus.yml").write_text(prometheus_config(run_folder / "prometheus.json"))
    address = f"127.0.0.1:{free_port()}"
    options = ("--config.file=prometheus.yml", "--storage.tsdb.path=store", f"--web.listen-address={address}")
    with (folder / "log").open("w") as stream:
        process = subprocess.Popen([executable, *options], cwd=folder, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def queries() -> list[str]:
    """Of all panels, with what Grafana would put in place of its variables."""
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return [expression.replace("$__rate_interval", "5m").replace("$run", ".*") for expression in expressions]


@dataclass(frozen=True)
class Series:
    labels: dict[str, str]
    value: float


def answered(prometheus: str, query: str) -> list[Series]:
    """What it finds now; nothing while it is starting."""
    with suppress(httpx.TransportError):
        response = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}, timeout=10.0)
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            return []
        answer = response.raise_for_status().json()
        return [Series(labels=found["metric"], value=float(found["value"][1])) for found in answer["data"]["result"]]
    return []


def test_every_query_of_the_dashboard_has_data_while_a_run_is_at_work(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    left = queries()
    assert len(left) > 45

    with prometheus_of(run_folder, tmp_path / "prometheus") as prometheus, run_at_work(run_folder) as run:
        ends = time.monotonic() + WAIT_S

        def wait(without: list[str]) -> None:
            assert run.poll() is None and time.monotonic() < ends, f"without data: {without}\n{run_folder.with_suffix('.log').read_text()}"
            time.sleep(1.0)

        def there(query: str) -> list[Series]:
            """What it finds, as soon as it is anything: a scrape that fails takes all series away until the next one."""
            while not (found := answered(prometheus, query)):
                wait([query])
            return found

        while left := [query for query in left if not answered(prometheus, query)]:
            wait(left)
        (series,) = there("ray_async_rlhf_target_updates")
        places = there("ray_async_rlhf_queue_groups")
        skipped = there("ray_async_rlhf_skipped_rows")

    assert (series.labels["run"], series.value) == ("run", MANY)
    assert {series.labels["place"] for series in places} == {"leased", "lost", "scoring", "waiting", "taken", "trained"}
    assert skipped[0].value >= 1


def test_the_shipped_configuration_is_one_that_prometheus_takes() -> None:
    checked = subprocess.run(
        [program("promtool"), "check", "config", "--syntax-only", str(MONITORING / "prometheus.yml")], capture_output=True, text=True
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr

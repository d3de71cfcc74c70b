"""The dashboard over HTTP: to whom it answers, with what headers; and the command around it."""

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from starlette.testclient import TestClient

from async_rlhf.commands.dashboard import run_dashboard
from async_rlhf.dashboard.catalogue import Catalogue, name_of
from async_rlhf.dashboard.server import KINDS, make_app, page_files
from async_rlhf.errors import ConfigError
from tests.support.dashboard_runs import HOSTILE, WrittenRun, row_of


@pytest.fixture
def run(tmp_path: Path) -> WrittenRun:
    made = WrittenRun(tmp_path / "runs" / "first")
    made.update(5)
    return made


@pytest.fixture
def client(run: WrittenRun) -> Iterator[TestClient]:
    with TestClient(make_app(Catalogue([run.folder], Path("nowhere"))), base_url="http://localhost:8000") as made:
        yield made


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", ""])
def test_a_page_under_another_name_is_refused(host: str, client: TestClient) -> None:
    for path in ("/", "/api/runs", "/static/app.js"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 403
        assert "first" not in answer.text


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:1234", "[::1]:80", "localhost"])
def test_this_machines_own_names_are_answered_whatever_port_leads_here(host: str, client: TestClient) -> None:
    assert client.get("/api/runs", headers={"host": host}).status_code == 200


def test_two_hosts_in_one_request_are_refused(client: TestClient) -> None:
    assert client.get("/", headers=[("host", "localhost"), ("host", "evil.example")]).status_code == 403


def test_every_answer_forbids_what_does_not_come_from_here(client: TestClient) -> None:
    for path in ("/", "/static/app.js", "/api/runs", "/absent", "/api/runs/absent"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_reading_is_answered(method: str, client: TestClient) -> None:
    assert {client.request(method, path).status_code for path in ("/", "/api/runs", "/static/app.js")} == {405}


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2f..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static//etc/passwd",
        "/static/server.py",
        "/api/runs/..%2f..",
        "/api/runs/first",
        "/api/runs/%00/curves",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_address_leads_out_of_the_page_or_to_other_folders(path: str, client: TestClient) -> None:
    assert client.get(path).status_code == 404


def test_the_page_loads_nothing_from_elsewhere_and_has_no_script_of_its_own_in_it() -> None:
    page = page_files()

    assert {"index.html", "style.css", "app.js"} <= set(page)
    for name, content in page.items():
        assert name.rpartition(".")[2] in KINDS
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text, name
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text, name
        assert len(text.splitlines()) < 300, name
    assert b"<script>" not in page["index.html"]
    assert b"style=" not in page["index.html"]


def test_the_json_of_a_run_is_json_and_its_texts_are_harmless_even_as_html(run: WrittenRun, client: TestClient) -> None:
    run.write_samples(HOSTILE + "\ud800", "\ud800")

    answers = [client.get(f"/api/runs/{name_of(run.folder)}{view}") for view in ("", "/curves", "/samples")]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert {answer.headers["content-type"] for answer in answers} == {"application/json"}
    assert answers[0].json()["title"] == "first"
    assert "[U+202E]" in answers[2].json()["held_out"]["rows"][0]["prompt"]


def test_runs_are_compared_by_their_names_and_unknown_ones_left_out(run: WrittenRun, client: TestClient) -> None:
    names = [run["name"] for run in client.get("/api/runs").json()["runs"]]

    assert [each["name"] for each in client.get(f"/api/compare?runs={names[0]},absent,{names[0]}").json()["runs"]] == names
    assert client.get("/api/compare").json()["runs"] == []


def test_a_folder_without_a_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        run_dashboard([tmp_path], 0, Console(file=io.StringIO()), open_browser=False)


def test_a_port_in_use_is_refused_with_a_remedy(run: WrittenRun) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="choose another --port"):
        run_dashboard([run.folder], taken.getsockname()[1], Console(file=io.StringIO()), open_browser=False)


HUGE = st.sampled_from([1.7e308, -1.7e308, 1e308, 5e-324, 0.0, -1.0, 3, 10**400, float("nan"), float("inf")]) | st.floats()


@given(numbers=st.lists(HUGE, min_size=1, max_size=4), seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_every_address_answers_whatever_numbers_the_folder_holds(
    numbers: list[float], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In rows, evaluations, samples, the state and settings, each number may be one of those drawn."""
    choice = Random(seed)

    def swept(value: object) -> object:
        match value:
            case bool() | str() | None:
                return value
            case dict():
                return {key: swept(each) for key, each in value.items()}
            case list():
                return [swept(each) for each in value]
            case _:
                return choice.choice([value, *numbers])

    made = WrittenRun(tmp_path_factory.mktemp("runs") / "first")
    made.update(24)
    made.evaluate(0, 0.25)
    made.evaluate(24, 0.5)
    made.write_samples("prompt", "completion")
    every = swept(row_of(1))  # what is said of each row but its version and time: the same, so that means and sums overflow
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        rows = [json.loads(line) for line in (made.folder / name).read_text().splitlines()]
        kept = {key: value for row in rows[:1] for key, value in row.items() if key in ("version", "time_s")}
        drawn = [row | every | {key: swept(row[key]) if choice.random() < 0.5 else row[key] for key in kept} for row in rows]
        (made.folder / name).write_text("".join(json.dumps(row) + "\n" for row in drawn))
    for name in ("state.json", "samples.json"):
        (made.folder / name).write_text(json.dumps(swept(json.loads((made.folder / name).read_text()))))
    config = yaml.safe_load((made.folder / "config.yaml").read_text())
    for key in ("max_staleness", "batch_groups", "completions_per_prompt"):
        config[key] = swept(config[key])
    (made.folder / "config.yaml").write_text(yaml.safe_dump(config))

    with TestClient(make_app(Catalogue([made.folder], Path("nowhere"))), base_url="http://localhost:8000") as client:
        name = client.get("/api/runs").json()["runs"][0]["name"]
        answers = [
            client.get(f"/api/{path}") for path in (f"runs/{name}", f"runs/{name}/curves", f"runs/{name}/samples", f"compare?runs={name}")
        ]

    for answer in answers:
        assert answer.status_code == 200
        json.loads(answer.text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_a_sum_and_a_product_beyond_all_numbers_are_absent(run: WrittenRun, client: TestClient) -> None:
    rows = [row_of(version) | {"reward/mean": 1.7e308, "generate/tokens_per_s": 1.7e308} for version in range(1, 9)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config | {"max_staleness": 1e308, "batch_groups": 64}))
    name = client.get("/api/runs").json()["runs"][0]["name"]

    flow = client.get(f"/api/runs/{name}").json()["flow"]

    assert (flow["queue"]["bound"], flow["means"]["generate/tokens_per_s"]) == (None, None)
    assert client.get(f"/api/compare?runs={name}").json()["runs"][0]["results"]["generator_tokens_per_s"] is None

"""A real run whose reward is a weighted sum: a function in processes, a reward model, and a service that goes away."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.recorder import read_rows
from async_rlhf.rewards.model import ModelReward
from async_rlhf.types import Prompt
from tests.support.cluster import make_model_folder
from tests.support.command import CHECKOUT, command, driver, environment, has_rows, rows_of, run_cli, summary_of, wait_for
from tests.support.http_server import free_port, free_ports
from tests.support.reward_models import save_reward_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FUNCTIONS = """
import os, time


def brevity(prompts, completions, **columns):
    time.sleep(0.15)  # so that a service can go away in the middle
    assert os.environ["WHO_RATES"] == "actors", "env reaches the processes"
    return [-len(completion) for completion in completions]


def digits(prompts, completions, **columns):
    return [sum(c.isdigit() for c in completion) + len(prompt) / 100 for prompt, completion in zip(prompts, completions)]
"""
TOKEN = "a-secret-of-this-test"


@contextmanager
def reward_service(*what: str, port: int) -> Iterator["subprocess.Popen[str]"]:
    """The real `serve-reward`; it serves when this is entered."""
    words = command("serve-reward", *what, "--port", str(port))
    env = {**environment(), "ASYNC_RLHF_REWARD_TOKEN": TOKEN}
    process = subprocess.Popen(words, cwd=CHECKOUT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/score" in line, line
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, a reward model and functions."""
    folder = tmp_path_factory.mktemp("parts")
    make_model_folder(folder / "policy")
    save_reward_model(folder / "judge", positions=128)
    (folder / "functions.py").write_text(FUNCTIONS)
    return folder


def train_words(parts: Path, run: Path, port: int) -> list[str]:
    return [
        *("train", "conf/quickstart.yaml", f"run.dir={run}", f"model.path={parts / 'policy'}", "generator.engine=transformers"),
        *("updates=6", "batch_groups=4", "completions_per_prompt=2", "queue.ties=keep", "task.held_out=8", "env.WHO_RATES=actors"),
        *("generator.max_inflight=8", "reward.count=1"),
        *(f"reward.parts.brevity.function={parts / 'functions.py'}:brevity", "reward.parts.brevity.processes=2"),
        *("reward.parts.brevity.weight=0.5", "reward.parts.model.kind=model", f"reward.parts.model.path={parts / 'judge'}"),
        *("reward.parts.digits.kind=http", f"reward.parts.digits.url=http://127.0.0.1:{port}/score", "reward.parts.digits.weight=2"),
        "reward.parts.digits.token_env=TEST_REWARD_TOKEN",
    ]


def rollouts(run: Path) -> list[dict[str, Any]]:
    return [row for part in sorted((run / "rollouts").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def test_a_weighted_sum_outlives_its_service_and_every_part_is_logged(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", TOKEN)
    port, run = free_port(), tmp_path / "run"
    digits, log = ("--function", f"{parts / 'functions.py'}:digits"), tmp_path / "log"
    patient = ("reward.parts.digits.retries=7", "timeouts.score_s=600")  # more than a service needs to come back on a busy machine
    with reward_service(*digits, port=port) as first, driver(log, *train_words(parts, run, port), *patient) as training:
        wait_for(has_rows(run, 1), training, log)
        first.send_signal(signal.SIGKILL)
        time.sleep(2.0)
        rows_before = len(read_rows(run))
        with reward_service(*digits, port=port):
            code = training.wait(600)

    assert code == 0, log.read_text()
    assert 1 <= rows_before < 6, "the service went away in the middle"
    rows = rows_of(run)
    assert len(rows) == 6 and summary_of(run)["failed_prompts"] == {}
    trained = [row for row in rollouts(run) if row["fate"] == "trained"]
    assert len(trained) == 6 * 4 * 2
    for row in trained:
        scores = {part["name"]: part["score"] for part in row["reward_parts"]}
        assert set(scores) == {"brevity", "model", "model.cut", "digits"}
        assert scores["brevity"] == -len(row["completion"]) and scores["model.cut"] == 0
        digits = sum(character.isdigit() for character in row["completion"]) + len(row["prompt"]) / 100
        assert scores["digits"] == pytest.approx(digits, rel=1e-5)
        assert row["score"] == pytest.approx(0.5 * scores["brevity"] + scores["model"] + 2 * scores["digits"], rel=1e-5, abs=1e-5)
    of_update = {update: [row for row in trained if row["update"] == update] for update in range(6)}
    for row in rows:
        for name in ("brevity", "model", "digits"):
            scores = [part["score"] for each in of_update[int(row["update"])] for part in each["reward_parts"] if part["name"] == name]
            assert row[f"reward/part/{name}"] == pytest.approx(sum(scores) / len(scores), rel=1e-5, abs=1e-6)
    page = (run / "report.html").read_text()
    assert all(f"Reward part {name}" in page for name in ("brevity", "model", "digits")) and "model.cut" not in page.split("Config</h2>")[0]
    events = b"".join(file.read_bytes() for file in (run / "tensorboard").iterdir())
    assert all(f"reward/part/{name}".encode() in events for name in ("brevity", "model", "digits"))
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if f"{parts / 'functions.py'}:brevity" in (p.info["cmdline"] or [])]
    assert all(TOKEN not in file.read_text(errors="ignore") for file in run.rglob("*") if file.is_file())


@pytest.mark.long
def test_a_service_that_stays_away_ends_the_run_by_name_and_resume_goes_on(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", TOKEN)
    port, run, log = free_port(), tmp_path / "run", tmp_path / "log"
    words = [*train_words(parts, run, port), "reward.parts.digits.backoff_s=0.1", "updates=12"]
    with reward_service("--function", f"{parts / 'functions.py'}:digits", port=port) as service, driver(log, *words) as training:
        wait_for(has_rows(run, 1), training, log)
        os.kill(service.pid, signal.SIGKILL)
        code = training.wait(300)

    assert code == 1, log.read_text()
    error = summary_of(run)["error"]
    assert (
        error.startswith("RewardLostError: reward.parts.digits: POST") and f"127.0.0.1:{port}/score" in error and "cannot connect" in error
    )
    assert summary_of(run)["failed_prompts"] == {}, "no prompt is to blame"
    assert 1 <= summary_of(run)["updates"] < 12

    with reward_service("--function", f"{parts / 'functions.py'}:digits", port=port):
        resumed = run_cli("resume", str(run))

    assert resumed.code == 0 and [row["update"] for row in rows_of(run)] == list(range(12)), resumed.output


def test_serve_reward_serves_a_model_and_the_reward_of_a_config(parts: Path) -> None:
    asked = {"prompts": ["1+1=", "1+1="], "completions": ["2", "12"], "columns": {"answer": ["2", "2"]}}
    ports = free_ports(2)
    words = ["conf/quickstart.yaml", "reward.parts.right.weight=3", f"reward.parts.digits.function={parts / 'functions.py'}:digits"]
    with reward_service("--model", str(parts / "judge"), port=ports[0]), reward_service(*words, port=ports[1]):
        model, summed = (
            httpx.post(f"http://127.0.0.1:{port}/score", json=asked, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False).json()
            for port in ports
        )

    prompts = [Prompt(prompt_id="p", text="1+1=", token_ids=np.zeros(0, np.int32))] * 2
    expected = ModelReward("judge", RewardPartConfig(path=str(parts / "judge"))).rate(prompts, asked["completions"]).scores
    np.testing.assert_allclose(model["scores"], expected, rtol=1e-5)
    np.testing.assert_allclose(summed["scores"], [3 + 1.04, 2.04], rtol=1e-6)


def test_a_service_that_is_not_there_is_refused_before_there_is_a_run_folder(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", TOKEN)
    done = run_cli(*train_words(parts, tmp_path / "run", free_port()))

    assert done.code == 2 and "reward.parts.digits.url" in done.output and "does not answer" in done.output, done.output
    assert "Traceback" not in done.output and not (tmp_path / "run").exists()

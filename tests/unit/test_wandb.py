"""Weights & Biases: what is checked before work starts, and that it can neither hold a run up nor end it."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import async_rlhf.wandb_sink as wandb_sink
from async_rlhf.commands.drive import _recorder
from async_rlhf.config import Config, load_config
from async_rlhf.errors import ConfigError
from async_rlhf.recorder import read_rows
from async_rlhf.run_plan import RunPlan
from async_rlhf.wandb_sink import WandbSink, check_wandb


def config_of(mode: str, *overrides: str) -> Config:
    return load_config(overrides=[f"run.wandb.mode={mode}", *overrides]).config


def start_instead(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have this code run in place of the writer."""
    real = subprocess.Popen
    monkeypatch.setattr(wandb_sink.subprocess, "Popen", lambda words, **options: real([sys.executable, "-c", code], **options))


def test_off_asks_for_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wandb_sink.importlib.util, "find_spec", lambda name: None)

    check_wandb(config_of("off"))


def test_a_missing_package_is_bad_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wandb_sink.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"offline.*package wandb is missing: pip install 'async-rlhf\[wandb\]'"):
        check_wandb(config_of("offline"))


def test_online_without_a_login_is_bad_input_and_with_one_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    logins = tmp_path / "netrc"
    logins.write_text("machine example.org\n login user\n password x\n")
    logins.chmod(0o600)
    monkeypatch.setenv("NETRC", str(logins))
    with pytest.raises(ConfigError, match="there is no login: run `wandb login`"):
        check_wandb(config_of("online"))

    logins.write_text("machine api.wandb.ai\n login user\n password x\n")
    check_wandb(config_of("online"))

    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    check_wandb(config_of("online"))


def test_the_writer_gets_the_config_every_row_in_order_and_of_incidents_no_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start_instead(monkeypatch, f"import sys; open({str(tmp_path / 'got')!r}, 'w').write(sys.stdin.read())")

    sink = WandbSink(tmp_path, config_of("offline", "seed=7"))
    sink.update({"update": 0, "version": 1, "train/loss": 0.5})
    sink.evaluation({"stage": "final", "version": 1, "evaluate/score": 0.25})
    sink.incident({"event": "lost", "name": "generator-0", "time": 1.5, "cause": "reward said s3cret on 10.0.0.7, pid 12, /home/me"})
    sink.incident({"event": "back", "name": "generator-0", "time": 2.5, "after_s": 1.0})
    sink.close()

    start, *entries = [json.loads(line) for line in (tmp_path / "got").read_text().splitlines()]
    assert (start["name"], start["mode"], start["config"]["seed"]) == (tmp_path.name, "offline", 7)
    assert entries == [
        {"row": {"update": 0, "version": 1, "train/loss": 0.5}},
        {"row": {"version": 1, "evaluate/score": 0.25}},
        {"incident": {"event": "lost", "name": "generator-0", "time": 1.5}},
        {"incident": {"event": "back", "name": "generator-0", "time": 2.5}},
    ]


def test_a_resumed_run_is_the_same_run_of_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start_instead(monkeypatch, f"import sys; open({str(tmp_path / 'got')!r}, 'a').write(sys.stdin.readline())")

    for _ in range(2):
        WandbSink(tmp_path, config_of("offline")).close()

    first, second = [json.loads(line) for line in (tmp_path / "got").read_text().splitlines()]
    assert first["id"] == second["id"]


@pytest.mark.parametrize("broken", ["folder", "process"])
def test_a_run_begins_without_a_sink_that_cannot_be_made(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    if broken == "folder":
        (tmp_path / "wandb").write_text("a file in its place")
    else:
        monkeypatch.setattr(wandb_sink.sys, "executable", str(tmp_path / "absent"))
    plan = RunPlan(config=config_of("offline"), run_folder=tmp_path, model_folder=tmp_path, reward="", metric="")

    with caplog.at_level(logging.WARNING):
        recorder = _recorder(plan)
        recorder.write({"version": 1})
        recorder.close()

    assert read_rows(tmp_path) == [{"version": 1}]
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == ["the run goes on without Weights & Biases"]


@pytest.mark.parametrize("code", ["import os; os._exit(3)", "import time; time.sleep(600)"], ids=["died", "stuck"])
def test_a_writer_that_died_or_is_stuck_holds_nobody_up_and_is_told_of_in_the_end(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    start_instead(monkeypatch, code)
    monkeypatch.setattr(wandb_sink, "MAX_QUEUED", 20)
    sink = WandbSink(tmp_path, config_of("offline", "run.wandb.close_s=0.5"))

    for version in range(500):
        sink.update({"version": version, "train/loss": 0.5, **{f"train/x{index}": 1.0 for index in range(200)}})
    with caplog.at_level(logging.WARNING):
        sink.close()

    assert "did not take everything" in caplog.text and str(tmp_path) in caplog.text

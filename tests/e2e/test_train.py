"""Whole runs from the command line."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support.command import ray_processes, rows_of, run_cli, run_until, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SUMMARY_KEYS = {
    *("start_accuracy", "final_accuracy", "max_staleness", "staleness_max", "updates", "prompts", "completions", "tokens", "wall_s"),
    *("generator_idle_share", "learner_idle_share", "dropped", "exit"),
}
QUICKSTART = "conf/quickstart.yaml"


def test_asynchronous_dpo_learns_within_its_staleness_bound_and_leaves_a_complete_run_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    done = run_cli("train", QUICKSTART, f"run.dir={folder}", "updates=30")

    assert done.code == 0, done.output
    summary, rows = summary_of(folder), rows_of(folder)
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["exit"] == "success"
    assert summary["final_accuracy"] > summary["start_accuracy"] + 0.05
    assert [row["update"] for row in rows] == list(range(30))
    assert max(row["queue/staleness_max"] for row in rows) == summary["staleness_max"] == 1
    lag = sum(row["queue/staleness_mean"] for row in rows) / len(rows)
    assert lag > 0.3, "the generator must be busy while the learner steps: a synchronous run has none"
    assert summary["prompts"] == 30 * 64 and summary["completions"] == 30 * 64 * 4
    for name in (
        "config.yaml",
        "state.json",
        "report.html",
        "samples.json",
        "model/config.json",
        "model/tokenizer.json",
        "model/README.md",
    ):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").glob("events*"))
    assert "report:" in done.output and "update 30/30" in done.output
    assert json.loads((folder / "model" / "generation_config.json").read_text())["temperature"] == 1.0

    again = run_cli("eval", str(folder))
    assert again.code == 0, again.output
    assert f"{summary['final_accuracy']:.3f}" in again.output, "eval must find the accuracy that the run reported"
    status = run_cli("status", str(folder))
    assert status.code == 0 and "finished" in status.output and "30 of 30 updates" in status.output
    report = run_cli("report", str(folder))
    assert report.code == 0 and str(folder / "report.html") in report.output


def test_rloo_with_two_generators_and_two_ranks_in_ticket_order_keeps_the_bound(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    done = run_cli(
        *("train", QUICKSTART, "algorithm=rloo", f"run.dir={folder}", "updates=8", "batch_groups=32"),
        *("generator.count=2", "learner.num_ranks=2", "learner.zero_stage=2", "queue.order=ticket", "weights.on_update=drain"),
        *("max_staleness=2", "algorithm.minibatches_per_batch=2"),
    )

    assert done.code == 0, done.output
    summary, rows = summary_of(folder), rows_of(folder)
    assert summary["updates"] == 8 and summary["optimizer_steps"] == 16
    assert 0 <= summary["staleness_max"] <= 2
    assert all(row["weights/canary_error_nats"] < 1e-3 for row in rows)
    assert all(row["train/grad_norm"] > 0 for row in rows)


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in rows_of(folder)]


def test_deterministic_runs_give_bit_equal_losses_and_two_generators_the_same_prompts(tmp_path: Path) -> None:
    common = ("train", QUICKSTART, "deterministic=true", "max_staleness=0", "queue.order=ticket", "updates=5")

    for name, more in (("a", ()), ("b", ()), ("c", ("generator.count=2",))):
        done = run_cli(*common, f"run.dir={tmp_path / name}", *more)
        assert done.code == 0, done.output

    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("a", "b"))
    assert all((first[name] == second[name]).all() for name in first)
    digests = [[row["queue/batch_digest"] for row in rows_of(tmp_path / name)] for name in ("a", "c")]
    assert digests[0] == digests[1]
    assert summary_of(tmp_path / "a")["staleness_max"] == 0, "max_staleness 0 is the synchronous trainer"


def test_ctrl_c_ends_a_run_cleanly_and_status_reads_it_while_it_lives(tmp_path: Path) -> None:
    folder, answers, alive = tmp_path / "run", [], set[int]()

    def look() -> None:
        alive.update(ray_processes())
        answers.append(run_cli("status", str(folder)))

    done = run_until(
        *("train", QUICKSTART, f"run.dir={folder}", "updates=500", "generator.engine=transformers", "batch_groups=16"),
        seen=lambda output: "update 2/" in output,
        between=look,
        signum=signal.SIGINT,
        log=tmp_path / "log",
    )

    assert done.code == 130, done.output
    assert len(alive) > 6, "the search for processes left behind must find those of a living run"
    assert "the live TrainingState actor" in answers[0].output, answers[0].output
    summary = summary_of(folder)
    assert summary["exit"] == "interrupted" and summary["updates"] >= 2
    assert (folder / "report.html").is_file()


def test_a_reward_that_returns_nan_ends_the_run_with_exit_code_2_and_its_name(tmp_path: Path) -> None:
    reward = tmp_path / "my_reward.py"
    reward.write_text("def score(prompts, completions, **columns):\n    return [float('nan')] * len(prompts)\n")

    done = run_cli(
        *("train", QUICKSTART, f"run.dir={tmp_path / 'run'}", f"reward.function={reward}:score", "updates=20"),
        "generator.engine=transformers",
    )

    assert done.code == 2, done.output
    assert "must return finite numbers, got nan" in done.output
    assert "Traceback" not in done.output
    assert summary_of(tmp_path / "run")["exit"] == "failed"

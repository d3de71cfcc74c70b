"""Evaluations of real runs: beside training, against references and other models, and without a trace in training itself."""

import json
from pathlib import Path

import pytest

from async_rlhf.evaluation_log import read_evaluations, read_samples
from async_rlhf.intervals import wilson_interval
from tests.support.command import rows_of, run_cli, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
QUICKSTART = "conf/quickstart.yaml"
SMALL = ("updates=6", "batch_groups=32", "evaluation.num_prompts=60", "evaluation.every_updates=2", "evaluation.sampled=true")


@pytest.mark.long
def test_deterministic_run_with_evaluations_trains_as_without_them_and_eval_finds_what_it_found(tmp_path: Path) -> None:
    folder, found = tmp_path / "with", tmp_path / "found.json"
    common = ("train", QUICKSTART, *SMALL, "deterministic=true", "max_staleness=0", "queue.order=ticket")

    done = run_cli(*common, f"run.dir={folder}", "evaluation.winrate=metric")
    plain = run_cli(*common, f"run.dir={tmp_path / 'without'}", "evaluation.every_updates=0", "evaluation.sampled=false")

    assert (done.code, plain.code) == (0, 0), done.output + plain.output
    for key in ("train/loss", "train/grad_norm", "reward/mean", "rollout/kl_k1_nats"):
        assert [row[key] for row in rows_of(folder)] == [row[key] for row in rows_of(tmp_path / "without")], key
    rows = read_evaluations(folder)
    assert [(row["stage"], row["version_min"], row["version_max"]) for row in rows] == [
        ("start", 0, 0),
        ("between", 2, 2),
        ("between", 4, 4),
        ("final", 6, 6),
    ]
    assert abs(rows[0]["evaluate/kl_nats"]) < 1e-4, "the start is its own reference"
    assert rows[-1]["evaluate/kl_nats"] != pytest.approx(0.0, abs=1e-3)
    # Against the right answers a right one ties and a wrong one loses.
    assert all(row["evaluate/winrate"] == pytest.approx(row["evaluate/score"] / 2) for row in rows)

    summary = summary_of(folder)
    assert summary["final_accuracy"] == summary["evaluation"]["final"]["score"] == rows[-1]["evaluate/score"]
    assert summary["kl_nats"] == rows[-1]["evaluate/kl_nats"] and summary["evaluations_dropped"] == {}
    assert summary["gold_start"] is None, "the metric itself is trained"
    report = (folder / "report.html").read_text()
    assert 'id="curve-frontier-score"' in report and 'id="curve-evaluated-winrate"' in report

    start = json.loads((folder / "origin.json").read_text())["model_folder"]
    again = run_cli("eval", str(folder), "--against", start, "--out", str(found))
    assert again.code == 0, again.output
    numbers = json.loads(found.read_text())
    assert numbers["numbers"]["evaluate/score"] == summary["final_accuracy"]
    assert numbers["numbers"]["evaluate/kl_nats"] == pytest.approx(rows[-1]["evaluate/kl_nats"], abs=1e-3), "the same seeds"
    before, after = (read_samples(folder)[name]["samples"] for name in ("start", "final"))
    wins, losses = (sum(sign * (b["score"] - a["score"]) > 0 for a, b in zip(before, after, strict=True)) for sign in (1, -1))
    assert numbers["numbers"]["evaluate/winrate"] == pytest.approx(0.5 + (wins - losses) / 120)
    assert numbers["numbers"]["evaluate/score_low"] == wilson_interval(sum(s["score"] == 1 for s in after), 60)[0]
    assert [sample["completion"] for sample in numbers["samples"]] == [sample["completion"] for sample in after]


def test_evaluations_go_on_beside_asynchronous_training(tmp_path: Path) -> None:
    done = run_cli("train", QUICKSTART, *SMALL, f"run.dir={tmp_path}", "evaluation.max_inflight=32", "generator.count=2")

    assert done.code == 0, done.output
    rows = read_evaluations(tmp_path)
    assert {row["version"] for row in rows} >= {0, 2, 6} and {row["version"] for row in rows} <= {0, 2, 4, 6}
    assert all(row["version"] <= row["version_min"] <= row["version_max"] <= 6 for row in rows)
    assert summary_of(tmp_path)["staleness_max"] <= 1
    assert f"evaluation at version {rows[1]['version']} (greedy, 60 held-out problems" in done.output

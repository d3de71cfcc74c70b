"""The learned reward and the gold behind it, from the author's summaries on; the figures stand in docs/mini-summary.md."""

from pathlib import Path

import pytest
import yaml

from tests.support.command import Finished, rows_of, run_cli, summary_of

EXPERIMENT = "conf/experiment/mini_summary.yaml"


def train(folder: Path, cache: Path, *more: str, timeout_s: float = 900) -> Finished:
    caches = (f"sft.cache_dir={cache}", f"reward_model.cache_dir={cache}")
    return run_cli("train", EXPERIMENT, f"run.dir={folder}", *caches, *more, timeout_s=timeout_s)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_stages_run_from_one_command_and_the_first_two_are_kept(tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "run"
    small = ("task.num_train=400", "sft.max_steps=20", "sft.eval_every=10", "reward_model.num_pairs=300", "reward_model.held_out=50")

    done = train(folder, cache, *small, "task.held_out=20", "updates=3", "batch_groups=16", "evaluation.num_prompts=20")

    assert done.code == 0, done.output
    stages = [done.output.index(text) for text in ("start: ", "reward model: ", "run folder: ", "update 3/3")]
    assert stages == sorted(stages), done.output
    summary = summary_of(folder)
    assert -3 < summary["gold_start"] <= 1 and -3 < summary["gold_end"] <= 1
    assert 0 <= summary["winrate"] <= 1
    assert abs(summary["kl_nats"]) < 5, "three updates cannot lead far away"
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    proxy = Path(settings["reward"]["parts"]["proxy"]["path"])
    assert proxy.parent == cache and (proxy / "model.safetensors").is_file()
    assert len(rows_of(folder)) == 3
    again = run_cli("reward-model", EXPERIMENT, f"sft.cache_dir={cache}", f"reward_model.cache_dir={cache}", *small, "task.held_out=20")
    assert again.code == 0 and "in the cache" in again.output, again.output
    assert str(proxy) in again.output


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_training_against_the_proxy_lifts_the_gold_at_moderate_kl(tmp_path: Path) -> None:
    done = train(tmp_path / "run", tmp_path / "cache", timeout_s=1100)

    assert done.code == 0, done.output
    summary = summary_of(tmp_path / "run")
    assert summary["gold_end"] > summary["gold_start"] + 0.05, "0.09 was measured"
    assert 0.2 < summary["kl_nats"] < 3
    assert summary["winrate"] > 0.6

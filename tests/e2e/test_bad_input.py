"""Bad input is one clear line and exit code 2, before any Ray starts."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_rlhf.config.schema import ModelConfig
from async_rlhf.tasks.start import build_policy, build_tokenizer
from tests.support.command import run_cli

QUICKSTART = "conf/quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("max_stalenes=1", ("unknown setting 'max_stalenes'", "did you mean 'max_staleness'")),
        ("updates=many", ("updates", "'many'")),
        ("completions_per_prompt=1", ("completions_per_prompt must be >= 2, got 1",)),
        ("algorithm=grpo completions_per_prompt=1", ("GRPO measures each completion against its group's", "set completions_per_prompt=2")),
        (
            "algorithm.correction=decoupled",
            ("weights the ratios of PPO, RLOO and GRPO, but dpo has none", "leave it out"),
        ),
        ("algorithm=rloo algorithm.ppo.critic.learning_rate=1e-4", ("algorithm.ppo.critic belongs to PPO", "set algorithm=ppo")),
        ("algorithm=ppo algorithm.ppo.critic.path=/no/critic", ("algorithm.ppo.critic.path", "/no/critic", "does not exist")),
        ("max_staleness=-1", ("max_staleness must be >= 0", "got -1", "use 0 for synchronous training")),
        ("batch_groups=63 learner.num_ranks=2", ("batch_groups (63) must be divisible by learner.num_ranks (2)",)),
        ("model.path=/no/such/folder", ("model.path", "/no/such/folder", "does not exist")),
        ("reward.function=no.such.module:score", ("reward.function", "does not import")),
        ("reward.function=async_rlhf.tasks.arithmetic:scores", ("has no function 'scores'",)),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(override: str, words: tuple[str, ...], tmp_path: Path) -> None:
    done = run_cli("train", QUICKSTART, *override.split(), f"run.dir={tmp_path / 'run'}")

    assert done.code == 2, done.output
    assert all(word in done.output for word in words), done.output
    assert "Traceback" not in done.output and "starting Ray" not in done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.fixture
def model_folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "model"
    tokenizer = build_tokenizer()
    build_policy(ModelConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16), tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(model_folder: Path, tmp_path: Path) -> None:
    settings = json.loads((model_folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))

    done = run_cli("train", QUICKSTART, f"model.path={model_folder}", f"run.dir={tmp_path / 'run'}")

    assert done.code == 2 and "has no end-of-sequence token" in done.output, done.output


def test_a_run_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}\n")

    done = run_cli("train", QUICKSTART, f"model.path={model_folder}", f"run.dir={tmp_path / 'run'}")

    assert done.code == 2 and "already holds a run" in done.output, done.output


def test_eval_of_a_folder_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    done = run_cli("eval", str(tmp_path))

    assert done.code == 2 and "config.json" in done.output, done.output


def test_status_of_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    done = run_cli("status", str(tmp_path))

    assert done.code == 2 and "is no run folder" in done.output, done.output


def test_config_prints_every_setting_with_its_origin() -> None:
    done = run_cli("config", QUICKSTART, "algorithm=rloo", "learner.learning_rate=1e-4")

    assert done.code == 0, done.output
    assert "learning_rate: 0.0001" in done.output and "# learner.learning_rate=1e-4" in done.output
    assert "name: rloo" in done.output and "conf/algorithm/rloo.yaml" in done.output

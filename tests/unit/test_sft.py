"""The supervised start: stopping at the target, saving all or nothing, and the cache."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_rlhf.commands.sft import run_sft
from async_rlhf.config.schema import Config, ModelConfig
from async_rlhf.config.stages import SFTConfig
from async_rlhf.config.tasks import TaskConfig
from async_rlhf.errors import ConfigError, RunError
from async_rlhf.sft import FILES, SFTProgress, cached_start, start_folder, train_start
from async_rlhf.tasks.landing import LANDING_TOLERANCE, copy_weights, land

# 49 one-digit sums: learned by a toy model within a second.
TINY = Config(
    task=TaskConfig(max_operand=6, held_out=20),
    model=ModelConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64),
    sft=SFTConfig(target_accuracy=0.35, batch_size=16, learning_rate=1e-2, eval_every=5, max_steps=300),
)


def _ignore(progress: SFTProgress) -> None:
    del progress


@pytest.mark.slow
def test_start_lands_near_the_target_and_is_an_ordinary_model_folder(tmp_path: Path):
    seen: list[SFTProgress] = []
    folder = tmp_path / "deep" / "start"

    result = train_start(TINY, folder, seen.append)

    # One problem of 20 is 0.05: nearer than half of that cannot be asked for.
    assert abs(result.accuracy - 0.35) <= LANDING_TOLERANCE + 0.05
    assert [progress.step for progress in seen if not progress.looked] == list(range(1, result.steps + 1))
    assert set(FILES) <= {path.name for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["start"]
    facts = json.loads((folder / "start.json").read_text())
    assert (facts["accuracy"], facts["steps"], facts["sft"]["target_accuracy"]) == (result.accuracy, result.steps, 0.35)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


class _ExamOfOneWeight:
    """The accuracy is the weight itself."""

    def accuracy(self, model: torch.nn.Linear) -> float:
        return model.weight.item()


def test_landing_bisects_the_line_between_two_looks_until_the_accuracy_is_near_the_target():
    """From 0 to 1, target 0.4 within 0.02: 0.5, 0.25, 0.375 (off by 0.025), 0.4375, 0.40625."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    below = copy_weights(model)  # type: ignore[arg-type]
    torch.nn.init.ones_(model.weight)

    accuracy = land(model, _ExamOfOneWeight(), below, target=0.4)  # type: ignore[arg-type]

    assert accuracy == model.weight.item() == 0.40625


@pytest.mark.slow
def test_same_seed_trains_the_same_weights_and_another_seed_others(tmp_path: Path):
    short = replace(TINY, sft=replace(TINY.sft, max_steps=30, target_accuracy=1.0))
    weights: list[torch.Tensor] = []
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        train_start(replace(short, sft=replace(short.sft, seed=seed)), tmp_path / name, _ignore)
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight)

    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.slow
def test_start_below_the_target_is_kept_with_a_warning_that_says_its_accuracy(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    short = replace(TINY, sft=replace(TINY.sft, max_steps=160, target_accuracy=1.0))

    with caplog.at_level(logging.WARNING, logger="async_rlhf.sft"):
        result = train_start(short, tmp_path / "start", _ignore)

    assert 0.0 < result.accuracy < 0.94
    assert f"held-out accuracy {result.accuracy:.3f} after 160 steps" in caplog.text


@pytest.mark.slow
def test_start_that_answers_nothing_right_is_refused_and_leaves_no_folder(tmp_path: Path):
    hopeless = replace(
        TINY, task=TaskConfig(num_operands=6, max_operand=9999, held_out=5, num_train=20), sft=replace(TINY.sft, max_steps=1)
    )

    with pytest.raises(RunError, match=r"accuracy 0 after 1 steps; raise sft\.max_steps"):
        train_start(hopeless, tmp_path / "start", _ignore)

    assert list(tmp_path.iterdir()) == []


def test_folder_that_holds_something_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(ConfigError, match="must not exist or be empty"):
        train_start(TINY, tmp_path, _ignore)


@pytest.mark.slow
def test_second_run_uses_the_cache_and_says_how_to_make_the_start_again(tmp_path: Path):
    config = replace(TINY, sft=replace(TINY.sft, max_steps=150, cache_dir=str(tmp_path)))
    first, second = io.StringIO(), io.StringIO()

    made = run_sft(config, None, Console(file=first))
    found = run_sft(config, None, Console(file=second))

    assert made == found == start_folder(config)
    assert "sft step 5: loss " in first.getvalue()
    assert second.getvalue().startswith(f"start: {made} (in the cache; held-out accuracy ")
    assert "delete the folder to make it again" in second.getvalue()
    (made / "model.safetensors").unlink()
    assert cached_start(config) is None


@pytest.mark.slow
def test_terminal_gets_one_bar_instead_of_lines(tmp_path: Path):
    out = io.StringIO()

    run_sft(replace(TINY, sft=replace(TINY.sft, max_steps=150)), tmp_path / "start", Console(file=out, force_terminal=True, width=120))

    assert "held-out accuracy" in out.getvalue()
    assert "sft step" not in out.getvalue()


def test_cache_key_changes_with_each_setting_that_decides_the_weights_and_with_no_other(tmp_path: Path):
    config = replace(TINY, sft=replace(TINY.sft, cache_dir=str(tmp_path)))
    same = [replace(config, updates=7), replace(config, seed=9), replace(config, model=replace(config.model, path="elsewhere"))]
    other = [
        replace(config, task=replace(config.task, seed=1)),
        replace(config, model=replace(config.model, family="qwen3")),
        replace(config, sft=replace(config.sft, seed=1)),
    ]

    assert {start_folder(each) for each in same} == {start_folder(config)}
    assert len({start_folder(each) for each in [config, *other]}) == 4
    assert start_folder(config).name.startswith("start-arithmetic-")


def test_cache_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert start_folder(TINY).parent == tmp_path / "async_rlhf"

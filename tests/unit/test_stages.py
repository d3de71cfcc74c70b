"""Stages as plain objects: where they work, from where they go on, what decides their results, and what is learned."""

import fcntl
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from async_rlhf.config import load_config
from async_rlhf.config.prompts import SourceConfig
from async_rlhf.config.schema import Config
from async_rlhf.config.stages import RelabelConfig, RewardModelConfig, SFTConfig
from async_rlhf.errors import ConfigError, StageStopped
from async_rlhf.sft import FILES, start_folder
from async_rlhf.stages.books import StageBooks
from async_rlhf.stages.finetune import UNTRAINED, finetune, held_out_loss
from async_rlhf.stages.folder import WHOLE, StageFolder, TargetTakenError, work_folder, working
from async_rlhf.stages.messages import StageJob, StageProgress, StageWatch
from async_rlhf.stages.perform import perform
from async_rlhf.stages.relabel import relabel
from async_rlhf.stages.reward_model import measure, reward_model_folder, train_reward_model
from tests.support.cluster import make_model_folder
from tests.support.tiny_policy import logprobs_of, tiny_policy

GOLD = "tests.unit.test_stages:count_nines"


def count_nines(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward."""
    return [float(text.count("9")) for text in completions]


def ignore(progress: StageProgress) -> None:
    del progress


WATCH = StageWatch(on_progress=ignore)


def jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def make_checkpoint(folder: StageFolder, step: int, *, whole: bool = True) -> Path:
    checkpoint = folder.trainer / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    if whole:
        (checkpoint / WHOLE).touch()
    return checkpoint


class _Holder:
    """Another process in a work folder: the kernel tells file handles apart, not processes."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True)
        self._handle = (work / "LOCK").open("w")
        fcntl.flock(self._handle, fcntl.LOCK_EX)

    def release(self) -> None:
        """Let go."""
        self._handle.close()


# The work folder


def test_newest_whole_checkpoint_is_gone_on_from_and_one_that_a_kill_cut_short_is_not(tmp_path: Path):
    with working(tmp_path / "model", {}, WATCH) as folder:
        assert folder.newest_checkpoint() is None
        make_checkpoint(folder, 9)
        make_checkpoint(folder, 10)
        make_checkpoint(folder, 11, whole=False)

        assert folder.newest_checkpoint() == folder.trainer / "checkpoint-10"


def test_work_with_a_checkpoint_outlives_any_error_and_an_empty_work_folder_none(tmp_path: Path):
    with pytest.raises(ValueError), working(tmp_path / "empty", {}, WATCH):
        raise ValueError
    with pytest.raises(ValueError), working(tmp_path / "begun", {}, WATCH) as folder:
        make_checkpoint(folder, 1)
        raise ValueError

    assert [path.name for path in tmp_path.iterdir()] == ["begun.partial"]


def test_checkpoint_of_other_settings_is_refused_with_what_differs(tmp_path: Path):
    with pytest.raises(ValueError), working(tmp_path / "model", {"learning_rate": 1.0}, WATCH) as folder:
        make_checkpoint(folder, 1)
        raise ValueError

    refused = pytest.raises(ConfigError, match=r'- "learning_rate": 1.0; \+ "learning_rate": 2.0.*or delete it')
    with refused, working(tmp_path / "model", {"learning_rate": 2.0}, WATCH):
        pass

    assert (tmp_path / "model.partial" / "trainer" / "checkpoint-1").is_dir()


def test_target_appears_with_everything_in_it_and_takes_the_work_folder_along(tmp_path: Path):
    with working(tmp_path / "model", {}, WATCH) as folder:
        (folder.made / "weights").write_text("w")
        assert not (tmp_path / "model").exists()
        folder.finish()

    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "w"
    with pytest.raises(TargetTakenError, match="must not exist or be empty"), working(tmp_path / "model", {}, WATCH):
        pass


def test_second_process_waits_says_for_whom_and_can_be_stopped_while_it_waits(tmp_path: Path):
    told: list[str] = []
    waiting = StageWatch(on_progress=lambda progress: told.append(progress.note), stopping=lambda: bool(told))

    with working(tmp_path / "model", {}, WATCH) as folder:
        make_checkpoint(folder, 1)
        with pytest.raises(StageStopped), working(tmp_path / "model", {}, waiting):
            pass

    assert len(told) == 1 and told[0].startswith("waiting for process ") and str(work_folder(tmp_path / "model")) in told[0]


def test_cached_result_that_another_process_finishes_meanwhile_is_taken(tmp_path: Path):
    config = Config(sft=SFTConfig(cache_dir=str(tmp_path)))
    job = StageJob(kind="sft", config=config, target=start_folder(config), cached=True)

    def finish_once_somebody_waits(progress: StageProgress) -> None:
        if "waiting for" in progress.note:
            for name in FILES:
                (job.target / name).write_text('{"accuracy": 0.4}')
            other.release()

    other = _Holder(work_folder(job.target))
    job.target.mkdir()
    result = perform(job, StageWatch(on_progress=finish_once_somebody_waits))

    assert result.target == job.target and "in the cache; held-out accuracy 0.400" in result.lines[0]


def test_rows_after_the_checkpoint_and_one_cut_by_the_kill_are_taken_back(tmp_path: Path):
    books = StageBooks(tmp_path)
    for step in (5, 10, 15):
        books.write(step, {"train/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 20, "tra')

    books.cut_after(10)
    books.close()

    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [5, 10]


# What decides a result


def test_start_of_the_quickstart_keeps_its_cache_key():
    """A finished start in somebody's cache stays good as long as the settings that decide its weights do."""
    config = load_config(["conf/quickstart.yaml"]).config

    assert start_folder(config).name == "start-arithmetic-9c26d6f6db43"
    harmless = replace(config.sft, num_cpus=2.0, save_every=7, held_out=3, epochs=9.0, max_length=77, cache_dir=config.sft.cache_dir)
    assert start_folder(replace(config, sft=harmless)) == start_folder(config)
    for setting in ({"schedule": "linear"}, {"warmup_steps": 3}, {"precision": "bfloat16"}, {"batch_size": 64}):
        assert start_folder(replace(config, sft=replace(config.sft, **setting))) != start_folder(config)  # type: ignore[arg-type]


def test_reward_model_has_another_cache_key_for_other_settings_rows_or_start(tmp_path: Path):
    path = jsonl(tmp_path / "pairs.jsonl", [{"prompt": "1", "chosen": "2", "rejected": "3"}])
    own = RewardModelConfig(sources={"pairs": SourceConfig(path=path)})
    config = Config(reward_model=own)
    first = reward_model_folder(config)

    assert reward_model_folder(replace(config, updates=3, reward_model=replace(own, save_every=1, num_cpus=2.0))) == first
    others = [
        replace(config, reward_model=replace(own, seed=1)),
        replace(config, reward_model=replace(own, center_coef=0.01)),
        replace(config, sft=replace(config.sft, seed=1)),
        replace(config, task=replace(config.task, seed=1)),
    ]
    keys = {reward_model_folder(each) for each in others}
    jsonl(tmp_path / "pairs.jsonl", [{"prompt": "1", "chosen": "2", "rejected": "34"}])
    assert len({first, *keys, reward_model_folder(config)}) == 6


# What is learned


def test_held_out_loss_is_the_mean_over_completion_tokens_whatever_the_batches():
    """Prompt and padding tokens do not count; the oracle scores each sequence alone."""
    model = tiny_policy()
    texts = [([3, 4, 5], [6, 7, 1]), ([8], [9, 1]), ([10, 11], [1])]
    examples = [{"input_ids": [*p, *c], "labels": [UNTRAINED] * len(p) + c} for p, c in texts]
    expected = -float(np.concatenate([logprobs_of(model, p, c) for p, c in texts]).mean())

    for batch_size in (1, 2, 3):
        measured = held_out_loss(model, examples, 0, SFTConfig(batch_size=batch_size))
        assert measured["loss_nats"] == pytest.approx(expected, abs=1e-5)
        assert measured["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_fine_tuning_learns_completions_and_their_end_and_leaves_the_prompt_alone(tmp_path: Path):
    """Prompts are random digits, so that learning them would show; every completion is `+` and the end."""
    base = make_model_folder(tmp_path / "base")
    rng = np.random.default_rng(0)
    rows = [{"prompt": "".join(map(str, rng.integers(0, 10, 5))) + "=", "completion": "+"} for _ in range(80)]
    source = SourceConfig(path=jsonl(tmp_path / "rows.jsonl", rows), completion_column="completion")
    sft = SFTConfig(sources={"rows": source}, held_out=16, epochs=20, batch_size=32, gradient_accumulation=2, eval_every=20, warmup_steps=2)
    config = Config(sft=sft)
    told: list[StageProgress] = []

    finetune(replace(config, model=replace(config.model, path=str(base))), tmp_path / "out", StageWatch(on_progress=told.append))

    facts = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert facts["end"]["perplexity"] < 1.1 < 3 < facts["start"]["perplexity"]
    assert (facts["steps"], facts["rows"]) == (40, {"trained": 64, "held_out": 16, "left_out": []})
    assert [progress.step for progress in told if progress.looked] == [20, 40]
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    prompt = [3, 4, 5, 6, 7]
    # The prompt's own tokens are no likelier than before: they were never a label.
    assert logprobs_of(after, prompt[:1], prompt[1:]).mean() < logprobs_of(before, prompt[:1], prompt[1:]).mean() + 0.5
    assert after.generation_config.eos_token_id == 1


def test_fine_tuning_without_a_model_or_a_completion_column_is_refused(tmp_path: Path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "1", "completion": "2"}])
    config = Config(sft=SFTConfig(sources={"rows": SourceConfig(path=path)}))
    base = make_model_folder(tmp_path / "base")

    with pytest.raises(ConfigError, match=r"set model\.path"):
        finetune(config, tmp_path / "out", WATCH)
    with pytest.raises(ConfigError, match=r"set sft\.sources\.rows\.completion_column"):
        finetune(replace(config, model=replace(config.model, path=str(base))), tmp_path / "out", WATCH)


# Reward models


def test_accuracy_counts_ties_half_and_knows_its_interval():
    """3 right, 1 wrong, 4 ties: 5 of 8; Wilson 1927 at 95 %: 0.306 to 0.863."""
    scores = np.array([[1, 0]] * 3 + [[0, 1]] + [[2, 2]] * 4, dtype=np.float32)

    measured = measure(scores)

    assert measured["accuracy"] == 5 / 8
    assert measured["interval"] == pytest.approx([0.3057, 0.8632], abs=1e-3)
    assert measured["margin_mean"] == pytest.approx(2 / 8)


def test_margin_and_centring_enter_the_loss_of_the_first_step(tmp_path: Path):
    """With a head of zeros every score is 0: -log sigmoid(-margin), and nothing to centre."""
    base = make_model_folder(tmp_path / "base")
    rows = [{"prompt": "1=", "chosen": f"{i}9", "rejected": f"{i}8", "by": 2.0} for i in range(20)]
    source = SourceConfig(path=jsonl(tmp_path / "pairs.jsonl", rows), margin_column="by")
    losses: dict[str, float] = {}
    for name, use_margin in (("plain", False), ("margin", True)):
        own = RewardModelConfig(
            sources={"pairs": source}, held_out=4, batch_size=16, eval_every=1, use_margin=use_margin, center_coef=0.01, path=str(base)
        )
        train_reward_model(Config(reward_model=own), tmp_path / name, WATCH)
        losses[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]

    assert losses["plain"] == pytest.approx(math.log(2), abs=1e-5)
    assert losses["margin"] == pytest.approx(math.log(1 + math.exp(2.0)), abs=1e-5)


def test_task_without_pairs_of_its_own_asks_for_sources(tmp_path: Path):
    base = make_model_folder(tmp_path / "base")

    with pytest.raises(ConfigError, match=r"arithmetic has no preference pairs of its own; give reward_model\.sources"):
        train_reward_model(Config(reward_model=RewardModelConfig(path=str(base))), tmp_path / "rm", WATCH)


# Relabelling


def relabel_config(path: str, **settings: Any) -> Config:
    config = Config(relabel=RelabelConfig(sources={"pairs": SourceConfig(path=path)}, batch_size=2, rows_per_part=2, **settings))
    return replace(config, reward=replace(config.reward, function=GOLD))


def test_stopped_relabelling_goes_on_where_it_was_and_ends_like_an_undisturbed_one(tmp_path: Path):
    rows = [{"prompt": "1=", "chosen": "9" * (i % 3), "rejected": "1" + "9" * (i % 2), "id": i} for i in range(11)]
    config = relabel_config(jsonl(tmp_path / "pairs.jsonl", [row for row in rows if row["chosen"]]), ties="keep")
    looks: list[StageProgress] = []
    stopper = StageWatch(on_progress=looks.append, stopping=lambda: len(looks) == 2)

    with pytest.raises(StageStopped, match="after 4 pairs"):
        relabel(config, tmp_path / "out.parquet", stopper)
    again: list[StageProgress] = []
    resumed = relabel(config, tmp_path / "out.parquet", StageWatch(on_progress=again.append))
    whole = relabel(config, tmp_path / "whole.parquet", WATCH)

    assert [progress.step for progress in again if progress.looked] == [6, 7] and "going on from pair 4" in again[0].note
    assert resumed.lines[1] == whole.lines[1]
    out, undisturbed = (parquet.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("out", "whole"))
    assert out == undisturbed and [row["id"] for row in out] == [1, 2, 4, 5, 7, 8, 10]
    assert all(row["score_chosen"] - row["score_rejected"] == row["margin"] >= 0 for row in out)
    assert not work_folder(tmp_path / "out.parquet").exists()


def test_ties_are_dropped_by_default_and_counted(tmp_path: Path):
    rows = [{"prompt": "1=", "chosen": "8", "rejected": "7"}, {"prompt": "1=", "chosen": "8", "rejected": "9"}]

    result = relabel(relabel_config(jsonl(tmp_path / "pairs.jsonl", rows)), tmp_path / "out.parquet", WATCH)

    [row] = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert (row["chosen"], row["score_chosen"], row["score_rejected"], row["margin"]) == ("9", 1.0, 0.0, 1.0)
    assert "1 turned round, 1 ties left out" in result.lines[1]


def test_relabelling_overwrites_no_file_and_needs_a_set(tmp_path: Path):
    (tmp_path / "out.parquet").write_text("mine")

    with pytest.raises(ConfigError, match="exists already"):
        relabel(Config(), tmp_path / "out.parquet", WATCH)
    with pytest.raises(ConfigError, match=r"must be a \.parquet file"):
        relabel(Config(), tmp_path / "out.csv", WATCH)
    with pytest.raises(ConfigError, match=r"give relabel\.sources"):
        relabel(Config(), tmp_path / "other.parquet", WATCH)


def test_gradient_accumulation_must_divide_the_batch():
    with pytest.raises(
        ConfigError, match=r"sft\.batch_size \(128\) must be a multiple of sft\.gradient_accumulation \(3\).*sft\.batch_size=129"
    ):
        load_config(overrides=["sft.gradient_accumulation=3"])


def test_accumulated_passes_train_the_same_weights_as_one(tmp_path: Path):
    """The loss is a mean over the tokens of the whole batch, not of means over its parts: completions differ in length."""
    base = make_model_folder(tmp_path / "base")
    rows = [{"prompt": f"{i}=", "completion": "9" * (1 + i % 7)} for i in range(34)]
    source = SourceConfig(path=jsonl(tmp_path / "rows.jsonl", rows), completion_column="completion")
    from safetensors.torch import load_file

    weights: list[dict[str, torch.Tensor]] = []
    for parts in (1, 4):
        sft = SFTConfig(sources={"rows": source}, held_out=2, batch_size=16, gradient_accumulation=parts, learning_rate=1e-3)
        config = Config(sft=sft)
        finetune(replace(config, model=replace(config.model, path=str(base))), tmp_path / str(parts), WATCH)
        weights.append(load_file(tmp_path / str(parts) / "model.safetensors"))

    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-3)

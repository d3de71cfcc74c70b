"""A reward model from preference pairs: Bradley-Terry, with TRL's RewardTrainer.

    loss = -log sigmoid(score(chosen) - score(rejected) - margin) + center_coef (score(chosen) + score(rejected))^2, mean over pairs

Sources: Bradley and Terry 1952; arXiv 2009.01325; margin: arXiv 2307.09288; centring: arXiv 2312.09244.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (datasets ships no types; transformers and torch type their methods partially.)

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from async_rlhf.config.prompts import SourceConfig
from async_rlhf.config.schema import Config
from async_rlhf.errors import ConfigError
from async_rlhf.intervals import wilson_interval
from async_rlhf.sft import cached_start, start_folder
from async_rlhf.stages.books import StageBooks
from async_rlhf.stages.encode import PairEncoder
from async_rlhf.stages.folder import StageFolder, working
from async_rlhf.stages.messages import StageProgress, StageResult, StageWatch
from async_rlhf.stages.pairs import Pair, pair_of
from async_rlhf.stages.rows import Row, fingerprint, read_sources, split_held_out
from async_rlhf.stages.task_pairs import task_pairs
from async_rlhf.stages.trainer import arguments, fit, quiet_libraries
from async_rlhf.state import write_atomically

RECIPE = 1
"""Part of the cache key; counts changes of this module that make other weights from the same settings."""
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "reward_model.json")
"""What a finished reward model consists of."""
FACTS = "reward_model.json"

Example = Mapping[str, Any]
"""`chosen_ids`, `rejected_ids`, and with use_margin `margin`."""


def reward_model_folder(config: Config) -> Path:
    """Where the reward model with these settings belongs in the cache; it need not exist."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "async_rlhf"
    key = hashlib.sha256(json.dumps({"recipe": RECIPE, **_settings(config)}, sort_keys=True).encode()).hexdigest()[:12]
    return Path(config.reward_model.cache_dir or default).expanduser() / f"reward-model-{config.task.name}-{key}"


def cached_reward_model(config: Config) -> Path | None:
    """The folder of the finished reward model with these settings; None: not made yet, or not complete."""
    folder = reward_model_folder(config)
    return folder if all((folder / name).is_file() for name in FILES) else None


def needs_start(config: Config) -> bool:
    """Whether the task's supervised start has to be made first."""
    return not config.reward_model.path and not config.model.path and cached_start(config) is None


def train_reward_model(config: Config, folder: Path, watch: StageWatch) -> dict[str, Any]:
    """Train a reward model and put it into `folder`, all or nothing: a sequence-classification folder with one label.

    Args:
        config: task, model, sft (of the start) and reward_model decide the result.
        folder: must not exist, or be empty.
    Returns:
        The facts in reward_model.json: `start` and `end` with the held-out `accuracy` (ties half), its 95 % `interval`, and `score_mean`
        and `score_std` over the held-out completions.
    Raises:
        ConfigError: the folder is taken, there is no model to start from, or settings or rows cannot work. StageStopped: `watch`
            asked for it.
    """
    with working(folder, _settings(config), watch) as work, quiet_libraries(), closing(StageBooks(work.made)) as books:
        return _Training(config, work, watch, books).run()


def make_reward_model(config: Config, folder: Path, watch: StageWatch) -> StageResult:
    """The same as a stage."""
    facts = train_reward_model(config, folder, watch)
    start, end = facts["start"], facts["end"]
    lines = (
        f"reward model: {folder} ({facts['steps']} steps, {facts['elapsed_s']:.0f} s)",
        f"held-out accuracy {_interval(start)} -> {_interval(end)} of {facts['pairs']['held_out']} pairs; "
        f"scores {end['score_mean']:.3f} +- {end['score_std']:.3f}",
    )
    return StageResult(target=folder, lines=lines)


class _Training:
    """One training: the trainer's steps, looks at the held-out pairs, and the finished folder."""

    def __init__(self, config: Config, work: StageFolder, watch: StageWatch, books: StageBooks) -> None:
        from transformers import AutoTokenizer

        from async_rlhf.policy import load_critic

        self._config, self._work, self._watch, self._books = config, work, watch, books
        self._began = time.monotonic()
        source = start_of(config)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        check_vocabulary(config, self._tokenizer)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        examples, self._notes = encode_pairs(config, self._tokenizer)
        self._train, self._held_out = split_held_out(examples, config.reward_model.held_out, config.reward_model.seed, "reward_model")
        self._model = load_critic(source)
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._max_steps = math.ceil(config.reward_model.epochs * math.ceil(len(self._train) / config.reward_model.batch_size))
        self._text = ""

    def run(self) -> dict[str, Any]:
        """Train, measure, save."""
        settings = self._config.reward_model
        for note in self._notes:
            self._watch.note(note)
        self._watch.note(
            f"{len(self._train)} pairs to train on, {len(self._held_out)} held out; {self._max_steps} steps of {settings.batch_size} pairs"
        )
        trainer = self._make_trainer()
        start = self._measure()
        self._report(0, looked=False)
        fit(trainer, self, self._work, settings.save_every, self._watch)
        end = self._measure()
        facts: dict[str, Any] = {
            "stage": "reward_model",
            **_settings(self._config),
            "pairs": {"trained": len(self._train), "held_out": len(self._held_out), "left_out": self._notes},
            "steps": self._max_steps,
            "start": start,
            "end": end,
            "elapsed_s": round(time.monotonic() - self._began, 1),
        }
        self._model.save_pretrained(self._work.made)
        self._tokenizer.save_pretrained(self._work.made)
        write_atomically(self._work.made / FACTS, json.dumps(facts, indent=2) + "\n")
        self._work.finish()
        return facts

    def resume(self, step: int) -> None:
        """The rows after `step` will be written again."""
        self._books.cut_after(step)

    def count_step(self, step: int) -> None:
        """One optimizer step was taken."""
        self._report(step, looked=False)

    def look(self, step: int, logs: Mapping[str, float]) -> bool:
        """Measure the accuracy on the held-out pairs."""
        measured = self._measure()
        row = {f"train/{key}": float(logs[key]) for key in ("loss", "grad_norm", "learning_rate", "accuracy") if key in logs}
        row |= {f"held_out/{key}": measured[key] for key in ("accuracy", "score_mean", "score_std")}
        self._books.write(step, {**row, "time_s": time.monotonic() - self._began})
        self._text = f"loss {logs['loss']:.4f}, held-out accuracy {measured['accuracy']:.3f}"
        self._report(step, looked=True)
        return False

    def _measure(self) -> dict[str, Any]:
        size = self._config.reward_model.batch_size // self._config.reward_model.gradient_accumulation
        return measure(score_pairs(self._model, self._held_out, self._tokenizer.pad_token_id, size))

    def _report(self, step: int, *, looked: bool) -> None:
        elapsed_s = time.monotonic() - self._began
        self._watch.on_progress(
            StageProgress(step=step, max_steps=self._max_steps, measured=self._text, looked=looked, elapsed_s=elapsed_s)
        )

    def _make_trainer(self) -> Any:
        from datasets import Dataset
        from trl.trainer.reward_config import RewardConfig as TrainerConfig
        from trl.trainer.reward_trainer import RewardTrainer

        given = arguments(self._config.reward_model, self._work, self._max_steps)
        return RewardTrainer(
            model=self._model,
            args=TrainerConfig(**given, center_rewards_coefficient=self._config.reward_model.center_coef or None),
            train_dataset=Dataset.from_list([dict(example) for example in self._train]),
            processing_class=self._tokenizer,
        )


def start_of(config: Config) -> Path:
    """The model folder that the training starts from.

    Raises:
        ConfigError: there is none.
    """
    given = config.reward_model.path or config.model.path
    folder = Path(given).expanduser().resolve() if given else cached_start(config)
    if folder is None:
        raise ConfigError("the task's supervised start must be made first; run `async-rlhf sft` with the same settings, or set model.path")
    key = "reward_model.path" if config.reward_model.path else "model.path"
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ConfigError(f"{key} must be a folder with a model and its tokenizer, got {folder}, which holds no {name}")
    return folder


def check_vocabulary(config: Config, tokenizer: Any) -> None:
    """Raise ConfigError unless the reward model reads the policy's own tokens."""
    if not config.reward_model.path or not config.model.path:
        return
    from transformers import AutoTokenizer

    policy: Any = AutoTokenizer.from_pretrained(Path(config.model.path).expanduser().resolve())
    if policy.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"reward_model.path {config.reward_model.path} reads another vocabulary ({len(tokenizer)} tokens) than the policy in "
            f"model.path ({len(policy)}); start from a model of the policy's family, or leave reward_model.path empty"
        )


def encode_pairs(config: Config, tokenizer: Any) -> tuple[list[Example], list[str]]:
    """All usable pairs as token ids, and a line for each source with unusable ones."""
    settings = config.reward_model
    encoder = PairEncoder(tokenizer, config.prompts.system, settings.max_length)
    for name, source in settings.sources.items():
        if settings.use_margin and not source.margin_column:
            raise ConfigError(f"reward_model.use_margin needs margins; set reward_model.sources.{name}.margin_column, or use_margin=false")

    def encode(pair: Pair) -> Example:
        example: dict[str, Any] = {
            "chosen_ids": encoder.encode_whole(pair.prompt, pair.chosen),
            "rejected_ids": encoder.encode_whole(pair.prompt, pair.rejected),
        }
        return {**example, "margin": pair.margin} if settings.use_margin else example

    if not settings.sources:
        return [encode(pair) for pair in task_pairs(config)], []

    def convert(source: SourceConfig, row: Row) -> Example:
        return encode(pair_of(source, row))

    return read_sources("reward_model", settings.sources, settings.max_bad_share, convert)


def score_pairs(model: Any, examples: Sequence[Example], pad_id: int, batch_size: int) -> np.ndarray:
    """[N, 2] scores of the chosen and the rejected completion of each pair."""
    import torch
    from trl.trainer.reward_trainer import DataCollatorForPreference

    collate, rows, training = DataCollatorForPreference(pad_token_id=pad_id), list[np.ndarray](), model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = collate([dict(example) for example in examples[start : start + batch_size]])
            ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1).float()
            rows.append(scores.view(2, -1).T.cpu().numpy())
    model.train(training)
    return np.concatenate(rows)


def measure(scores: np.ndarray) -> dict[str, Any]:
    """Accuracy (a tie counts half) with its 95 % interval, and what the scores are like; scores: [N, 2]."""
    right = float((scores[:, 0] > scores[:, 1]).sum() + 0.5 * (scores[:, 0] == scores[:, 1]).sum())
    return {
        "accuracy": right / len(scores),
        "interval": list(wilson_interval(round(right), len(scores))),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "margin_mean": float((scores[:, 0] - scores[:, 1]).mean()),
    }


def _interval(measured: Mapping[str, Any]) -> str:
    low, high = measured["interval"]
    return f"{measured['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def _settings(config: Config) -> dict[str, Any]:
    """All settings that decide the weights, and the state of the files that they name."""
    own = asdict(config.reward_model)
    for name in ("cache_dir", "num_cpus", "num_gpus", "save_every", "path"):
        del own[name]
    given = config.reward_model.path or config.model.path
    # The start's folder is named by a digest of what decides its weights.
    folder = Path(given).expanduser().resolve() if given else start_folder(config)
    model = [str(folder), *fingerprint(str(folder))] if given else [folder.name]
    files = {name: fingerprint(source.path) for name, source in config.reward_model.sources.items()}
    task = {key: value for key, value in asdict(config.task).items() if not isinstance(value, dict) or key == config.task.name}
    pairs: dict[str, Any] = {"sources": files} if files else {"task": task}
    return {"reward_model": own, "system": config.prompts.system, "start": model, "pairs": pairs}

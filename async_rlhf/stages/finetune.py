"""Supervised fine-tuning of a model folder on rows of prompts and completions; only the completion and its end are learned."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (datasets ships no types; transformers and torch type their methods partially.)

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_rlhf.config.schema import Config
from async_rlhf.errors import ConfigError
from async_rlhf.model_folders import check_model_folder
from async_rlhf.stages.books import StageBooks
from async_rlhf.stages.encode import PairEncoder
from async_rlhf.stages.folder import StageFolder, working
from async_rlhf.stages.messages import StageProgress, StageResult, StageWatch
from async_rlhf.stages.rows import fingerprint, prompt_of, read_sources, split_held_out, text_of
from async_rlhf.stages.trainer import arguments, fit, quiet_libraries
from async_rlhf.state import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNTRAINED = -100
"""Label of a token that is not learned."""
Example = Mapping[str, list[int]]
"""`input_ids`, and `labels`: the ids of the completion, UNTRAINED on the prompt."""


def check_finetune(config: Config) -> None:
    """Raise ConfigError unless there is a model to start from, and every source says what to learn."""
    if not config.model.path:
        raise ConfigError("sft.sources needs a model to start from; set model.path to a folder made by save_pretrained")
    check_model_folder(Path(config.model.path).expanduser().resolve())
    for name, source in config.sft.sources.items():
        if not source.completion_column:
            raise ConfigError(f"sft.sources.{name} must say what to learn; set sft.sources.{name}.completion_column")


def finetune(config: Config, folder: Path, watch: StageWatch) -> StageResult:
    """Fine-tune `model.path` on `sft.sources` and put it into `folder`, all or nothing, as an ordinary Hugging Face model folder.

    Raises:
        ConfigError: the folder is taken, or the settings or rows cannot work. StageStopped: `watch` asked for it.
    """
    check_finetune(config)
    with working(folder, _settings(config), watch) as work, quiet_libraries():
        return _Finetuning(config, work, watch).run()


class _Finetuning:
    """One training: the trainer's steps, looks at the held-out rows, and the finished folder."""

    def __init__(self, config: Config, work: StageFolder, watch: StageWatch) -> None:
        from transformers import AutoTokenizer

        from async_rlhf.policy import load_policy

        self._config, self._work, self._watch = config, work, watch
        self._began = time.monotonic()
        source = Path(config.model.path).expanduser().resolve()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        examples, self._notes = encode_rows(config, self._tokenizer)
        self._train, self._held_out = split_held_out(examples, config.sft.held_out, config.sft.seed, "sft")
        self._model = load_policy(source)
        steps = math.ceil(config.sft.epochs * math.ceil(len(self._train) / config.sft.batch_size))
        self._max_steps = min(steps, config.sft.max_steps)
        if self._max_steps < steps:
            self._notes.append(f"sft.max_steps={self._max_steps} ends it before {config.sft.epochs:g} epochs ({steps} steps)")
        self._books = StageBooks(work.made)
        self._measured: dict[str, float] = {}

    def run(self) -> StageResult:
        """Train, measure, save."""
        settings = self._config.sft
        for note in self._notes:
            self._watch.note(note)
        self._watch.note(
            f"{len(self._train)} rows to train on, {len(self._held_out)} held out; {self._max_steps} steps of {settings.batch_size} rows"
        )
        trainer = self._make_trainer()
        start = self._measure()
        self._report(0, looked=False, measured=start)
        fit(trainer, self, self._work, settings.save_every, self._watch)
        end = self._measure()
        self._books.close()
        elapsed_s = time.monotonic() - self._began
        _save(self._model, self._tokenizer, self._work.made)
        facts = {
            "stage": "sft",
            **_settings(self._config),
            "rows": {"trained": len(self._train), "held_out": len(self._held_out), "left_out": self._notes},
            "steps": self._max_steps,
            "start": start,
            "end": end,
            "elapsed_s": round(elapsed_s, 1),
        }
        write_atomically(self._work.made / "stage.json", json.dumps(facts, indent=2) + "\n")
        self._work.finish()
        first = f"model: {self._work.target} ({self._max_steps} steps, {elapsed_s:.0f} s)"
        lines = (first, f"{_describe(start)} -> {_describe(end)}") if end else (first,)
        return StageResult(target=self._work.target, lines=lines)

    def resume(self, step: int) -> None:
        """The rows after `step` will be written again."""
        self._books.cut_after(step)

    def count_step(self, step: int) -> None:
        """One optimizer step was taken."""
        self._report(step, looked=False)

    def look(self, step: int, logs: Mapping[str, float]) -> bool:
        """Measure loss and perplexity on the held-out rows."""
        held_out = self._measure()
        row = {f"train/{key}": float(logs[key]) for key in ("loss", "grad_norm", "learning_rate") if key in logs}
        row |= {f"held_out/{key}": value for key, value in held_out.items()}
        self._books.write(step, {**row, "time_s": time.monotonic() - self._began})
        self._report(step, looked=True, measured={"train_loss": float(logs["loss"]), **held_out})
        return False

    def _measure(self) -> dict[str, float]:
        return held_out_loss(self._model, self._held_out, self._tokenizer.pad_token_id, self._config.sft) if self._held_out else {}

    def _report(self, step: int, *, looked: bool, measured: Mapping[str, float] | None = None) -> None:
        self._measured = dict(measured) if measured is not None else self._measured
        elapsed_s, measured_text = time.monotonic() - self._began, _describe(self._measured)
        self._watch.on_progress(
            StageProgress(step=step, max_steps=self._max_steps, measured=measured_text, looked=looked, elapsed_s=elapsed_s)
        )

    def _make_trainer(self) -> Any:
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig as TrainerConfig
        from trl.trainer.sft_trainer import SFTTrainer

        given = arguments(self._config.sft, self._work, self._max_steps)
        return SFTTrainer(
            model=self._model,
            args=TrainerConfig(**given, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=Dataset.from_list([dict(example) for example in self._train]),
            processing_class=self._tokenizer,
        )


def encode_rows(config: Config, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[Example], list[str]]:
    """All usable rows as token ids with labels, and a line for each source with unusable ones."""
    encoder = PairEncoder(tokenizer, config.prompts.system, config.sft.max_length)

    def encode(source: Any, row: Mapping[str, Any]) -> Example:
        prompt_ids, completion_ids = encoder.encode(prompt_of(source, row), text_of(row, source.completion_column))
        return {"input_ids": [*prompt_ids, *completion_ids], "labels": [UNTRAINED] * len(prompt_ids) + completion_ids}

    return read_sources("sft", config.sft.sources, config.sft.max_bad_share, encode)


def held_out_loss(model: "PreTrainedModel", examples: Sequence[Example], pad_id: int, settings: Any) -> dict[str, float]:
    """`loss_nats`, the mean over all learned tokens of all examples, and its exponential, `perplexity`."""
    import torch
    from torch.nn.functional import cross_entropy
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=pad_id)
    total, count, training = 0.0, 0, model.training
    model.eval()
    size = settings.batch_size // settings.gradient_accumulation
    with torch.no_grad():
        for start in range(0, len(examples), size):
            batch = {key: value.to(model.device) for key, value in collate([dict(row) for row in examples[start : start + size]]).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=UNTRAINED, reduction="sum"))
            count += int((labels != UNTRAINED).sum())
    model.train(training)
    return {"loss_nats": total / count, "perplexity": math.exp(min(total / count, 700.0))}


def _describe(measured: Mapping[str, float]) -> str:
    names = {"train_loss": "loss {:.4f}", "loss_nats": "held-out loss {:.4f}", "perplexity": "perplexity {:.3f}"}
    return ", ".join(names[key].format(value) for key, value in measured.items())


def _settings(config: Config) -> dict[str, Any]:
    """All settings that decide the weights, and the state of the files that they name."""
    sft = asdict(config.sft)
    for name in ("target_accuracy", "wrong_share", "cache_dir", "num_cpus", "num_gpus", "save_every"):
        del sft[name]
    files = {name: fingerprint(source.path) for name, source in config.sft.sources.items()}
    path = str(Path(config.model.path).expanduser().resolve())
    return {"sft": sft, "system": config.prompts.system, "files": files, "model": [path, *fingerprint(path)]}


def _save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Weights, tokenizer with its chat template, and a generation config that knows where a completion ends."""
    generation: Any = model.generation_config
    if generation is not None and generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

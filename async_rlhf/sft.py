"""The supervised start: a small model that answers part of a task right, made with TRL's SFTTrainer and kept in a cache.

Training stops at `sft.target_accuracy` on purpose. Accuracy moves several points between two looks, so the first look above
the target may be far above it: then the weights are moved back along the straight line to the last look below the
target, until they answer as many held-out problems as asked for (`tasks.landing.land`).

This module imports neither torch nor trl until something has to be trained, so that finding a finished start is cheap.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (datasets ships no types; transformers types its methods partially.)

import hashlib
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from async_rlhf.config.schema import Config
from async_rlhf.errors import ConfigError, RunError
from async_rlhf.tasks import ExactTask, Task, load_task
from async_rlhf.tasks.landing import LANDING_TOLERANCE, Exam, copy_weights, land
from async_rlhf.tasks.start import build_policy, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

logger = logging.getLogger(__name__)

RECIPE = 4
"""Part of the cache key; counts changes of this module that make other weights from the same settings."""
FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "start.json")
"""What a finished start consists of."""
MAX_LOOK_PROBLEMS = 500
"""Held-out problems in one look during training: a standard error of 0.02 at accuracy 0.4."""
WARMUP_STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTProgress:
    """Where the training stands. Made after every optimizer step."""

    step: int
    max_steps: int
    loss: float | None
    """Mean over the steps between the last two looks, in nats per answer token; None before the first look."""
    accuracy: float | None
    """Greedy held-out accuracy at the last look; None before the first look."""
    looked: bool
    """The accuracy was measured at this very step."""
    elapsed_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTResult:
    """A finished start."""

    folder: Path
    accuracy: float
    """Greedy accuracy on the whole held-out set."""
    steps: int
    """Optimizer steps taken."""
    elapsed_s: float


def start_folder(config: Config) -> Path:
    """Where the start with these settings belongs; it need not exist."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "async_rlhf"
    key = hashlib.sha256(json.dumps({"recipe": RECIPE, **_settings(config)}, sort_keys=True).encode()).hexdigest()[:12]
    return Path(config.sft.cache_dir or default).expanduser() / f"start-{config.task.name}-{key}"


def cached_start(config: Config) -> Path | None:
    """The folder of the finished start with these settings; None: not made yet, or not complete."""
    folder = start_folder(config)
    return folder if all((folder / name).is_file() for name in FILES) else None


def train_start(config: Config, folder: Path, on_progress: Callable[[SFTProgress], None]) -> SFTResult:
    """Train the start and put it into `folder`, all or nothing, as an ordinary Hugging Face model folder.

    Args:
        config: task, model (without path) and sft decide the result; with one thread a seed gives the same weights again.
        folder: must not exist, or be empty.
        on_progress: called after every optimizer step.
    Raises:
        ConfigError: the folder is taken, or the settings cannot work.
        RunError: not one held-out problem is answered right.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"the folder of a new start must not exist or be empty, got {folder}; delete it or name another folder")
    began = time.monotonic()
    task = load_task(config.task)
    tokenizer = build_tokenizer(task.vocabulary)
    model = build_policy(config.model, tokenizer, config.sft.seed)
    looks = _Looks(config, model, Exam(tokenizer, task.held_out()[:MAX_LOOK_PROBLEMS], task.max_answer_tokens + 1), on_progress)
    with _quiet_libraries():
        _train(config, model, tokenizer, _make_examples(config, task, tokenizer), looks)
        looks.land()
        accuracy = Exam(tokenizer, task.held_out(), task.max_answer_tokens + 1).accuracy(model)
        _check_accuracy(config, accuracy, looks)
        result = SFTResult(folder=folder, accuracy=accuracy, steps=looks.step, elapsed_s=time.monotonic() - began)
        _save(config, model, tokenizer, result)
    return result


class _Looks:
    """Watches the accuracy during training, says when to stop, and lands on the target."""

    def __init__(self, config: Config, model: "PreTrainedModel", exam: Exam, on_progress: Callable[[SFTProgress], None]) -> None:
        self.step = 0
        self._target, self._max_steps = config.sft.target_accuracy, config.sft.max_steps
        self._model, self._exam, self._on_progress = model, exam, on_progress
        self._began = time.monotonic()
        self._loss: float | None = None
        self._accuracy: float | None = None
        self._below = copy_weights(model)

    def count_step(self, step: int) -> None:
        """One optimizer step was taken."""
        self.step = step
        self._report(looked=False)

    def look(self, loss: float) -> bool:
        """Measure the accuracy; True: the target is reached, stop."""
        self._loss, self._accuracy = loss, self._exam.accuracy(self._model)
        self._report(looked=True)
        if self._accuracy >= self._target:
            return True
        self._below = copy_weights(self._model)
        return False

    def land(self) -> None:
        """Bring the model back to the target if the last look was above it by more than the tolerance."""
        if self._accuracy is not None and self._accuracy > self._target + LANDING_TOLERANCE:
            self._accuracy = land(self._model, self._exam, self._below, target=self._target)
            self._report(looked=True)

    def _report(self, *, looked: bool) -> None:
        self._on_progress(
            SFTProgress(
                step=self.step,
                max_steps=self._max_steps,
                loss=self._loss,
                accuracy=self._accuracy,
                looked=looked,
                elapsed_s=time.monotonic() - self._began,
            )
        )


def _make_examples(config: Config, task: Task, tokenizer: "PreTrainedTokenizerFast") -> dict[str, list[list[int]]]:
    """All training problems as token ids; labels are -100 on the prompt, so only the answer and its end are learned."""
    rng = random.Random(config.sft.seed)
    examples: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for index in range(task.num_problems):
        problem = task.problem(index)
        answer = str(problem.columns["answer"])
        if isinstance(task, ExactTask) and rng.random() < config.sft.wrong_share:
            answer = task.careless_answer(problem, rng)
        prompt_ids = tokenizer.encode(problem.text)
        completion_ids = [*tokenizer.encode(answer), cast(int, tokenizer.eos_token_id)]
        examples["input_ids"].append([*prompt_ids, *completion_ids])
        examples["labels"].append([-100] * len(prompt_ids) + completion_ids)
    return examples


def _train(config: Config, model: Any, tokenizer: Any, examples: dict[str, list[list[int]]], looks: _Looks) -> None:
    """Run TRL's trainer until `looks` says stop or max_steps are done."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig as TrainerConfig
    from trl.trainer.sft_trainer import SFTTrainer

    with tempfile.TemporaryDirectory(prefix="async-rlhf-sft-") as scratch:
        trainer_config = TrainerConfig(
            output_dir=scratch,
            max_steps=config.sft.max_steps,
            per_device_train_batch_size=config.sft.batch_size,
            learning_rate=config.sft.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=min(WARMUP_STEPS, config.sft.max_steps),
            adam_beta2=0.95,
            logging_steps=min(config.sft.eval_every, config.sft.max_steps),
            seed=config.sft.seed,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            gradient_checkpointing=False,
            use_cache=True,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        dataset = Dataset.from_dict(examples)
        callback = _make_callback(looks)
        trainer = SFTTrainer(model=model, args=trainer_config, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _make_callback(looks: _Looks) -> "TrainerCallback":
    """The trainer's view of `looks`. TRL logs the mean loss every eval_every steps, which is when we look."""
    from transformers import TrainerCallback

    class LooksCallback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            looks.count_step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs is not None and "loss" in logs and looks.look(float(logs["loss"])):
                control.should_training_stop = True

    return LooksCallback()


@contextmanager
def _quiet_libraries() -> Generator[None]:
    """Keep the libraries' own progress bars, and DeepSpeed's remark that there is no GPU, off the terminal."""
    from transformers.utils import logging as transformers_logging

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    had_bars = transformers_logging.is_progress_bar_enabled()
    deepspeed_logger = logging.getLogger("DeepSpeed")
    transformers_logging.disable_progress_bar()
    deepspeed_logger.addFilter(is_error)
    try:
        yield
    finally:
        deepspeed_logger.removeFilter(is_error)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _settings(config: Config) -> dict[str, dict[str, Any]]:
    """All settings that decide the weights."""
    model, sft = asdict(config.model), asdict(config.sft)
    del model["path"], sft["cache_dir"]
    return {"task": asdict(config.task), "model": model, "sft": sft}


def _check_accuracy(config: Config, accuracy: float, looks: _Looks) -> None:
    """Refuse a start that knows nothing, and warn about one that knows less than asked for."""
    target = config.sft.target_accuracy
    if accuracy == 0.0:
        raise RunError(
            f"the supervised start must answer some held-out problems right, got accuracy 0 after {looks.step} steps; "
            "raise sft.max_steps, or make the task easier (task.num_operands, task.max_operand)"
        )
    if accuracy < target - 3 * LANDING_TOLERANCE:
        logger.warning(
            "the supervised start stops at held-out accuracy %.3f after %d steps, below sft.target_accuracy=%s; "
            "it is kept. Raise sft.max_steps to go on to the target",
            accuracy,
            looks.step,
            target,
        )


def _save(config: Config, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", result: SFTResult) -> None:
    """Write a sibling folder, then rename it: a reader sees a finished start or none."""
    result.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{result.folder.name}-", dir=result.folder.parent) as parent:
        made = Path(parent) / "start"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        facts = {**_settings(config), "accuracy": result.accuracy, "steps": result.steps, "elapsed_s": round(result.elapsed_s, 1)}
        (made / "start.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        try:
            os.replace(made, result.folder)
        except OSError:
            # Another process finished the same start first; its folder is as good as ours.
            if not all((result.folder / name).is_file() for name in FILES):
                raise

"""The supervised start: a small model that answers part of a task right, made with TRL's SFTTrainer and kept in a cache.

Where answers are right or wrong, training stops at `sft.target_accuracy` on purpose; where they are better or worse, after
`sft.max_steps`. Accuracy moves several points between two looks, so the first look above the target may be far above it: then the
weights are moved back along the straight line to the last look below the target, until they answer as many held-out problems as asked
for (`tasks.landing.land`).

This module imports neither torch nor trl until something has to be trained, so that finding a finished start is cheap.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (datasets ships no types; transformers types its methods partially.)

import hashlib
import json
import logging
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from async_rlhf.config.schema import Config, ModelConfig
from async_rlhf.config.stages import SFTConfig
from async_rlhf.errors import RunError
from async_rlhf.stages.books import StageBooks
from async_rlhf.stages.folder import StageFolder, working
from async_rlhf.stages.messages import StageProgress, StageResult, StageWatch
from async_rlhf.stages.trainer import arguments, fit, quiet_libraries
from async_rlhf.tasks import ExactTask, Task, load_task
from async_rlhf.tasks.landing import LANDING_TOLERANCE, Exam, copy_weights, land
from async_rlhf.tasks.start import build_policy, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

RECIPE = 4
"""Part of the cache key; counts changes of this module that make other weights from the same settings."""
FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "start.json")
"""What a finished start consists of."""
DECIDING = ("target_accuracy", "max_steps", "batch_size", "learning_rate", "wrong_share", "eval_every", "seed")
"""Settings of `sft` that are part of each cache key."""
ADDED = ("gradient_accumulation", "schedule", "warmup_steps", "precision")
"""Those that are part of it where they differ from their defaults."""
ADDED_TO_MODEL = ("initializer_range",)
"""The same of `model`."""
MAX_LOOK_PROBLEMS = 500
"""Held-out problems in one look during training: a standard error of 0.02 at accuracy 0.4."""


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


def train_start(config: Config, folder: Path, on_progress: Callable[[SFTProgress], None], watch: StageWatch | None = None) -> SFTResult:
    """Train the start and put it into `folder`, all or nothing, as an ordinary Hugging Face model folder.

    Args:
        config: task, model (without path) and sft decide the result; with one thread a seed gives the same weights again.
        folder: must not exist, or be empty.
        on_progress: called after every optimizer step.
        watch: gets notes alone, and may stop it; None: nobody does.
    Raises:
        ConfigError: the folder is taken, or the settings cannot work.
        RunError: not one held-out problem is answered right. StageStopped: `watch` asked for it.
    """
    watch = watch or StageWatch(on_progress=lambda progress: None)
    began = time.monotonic()
    with working(folder, _settings(config), watch) as work, quiet_libraries(), closing(StageBooks(work.made)) as books:
        task = load_task(config.task)
        tokenizer = build_tokenizer(task.vocabulary)
        model = build_policy(config.model, tokenizer, config.sft.seed)
        exam = Exam(tokenizer, task, MAX_LOOK_PROBLEMS)
        looks = _Looks(config, model, exam, on_progress, books)
        fit(
            _make_trainer(config, model, tokenizer, _make_examples(config, task, tokenizer), work),
            looks,
            work,
            config.sft.save_every,
            watch,
        )
        looks.land()
        accuracy = Exam(tokenizer, task).accuracy(model)
        try:
            _check_accuracy(accuracy, looks)
        except RunError:
            work.discard()
            raise
        result = SFTResult(folder=folder, accuracy=accuracy, steps=looks.step, elapsed_s=time.monotonic() - began)
        _save(config, model, tokenizer, result, work)
    return result


def make_start(config: Config, folder: Path, watch: StageWatch) -> StageResult:
    """The same as a stage; see train_start."""

    def on_progress(progress: SFTProgress) -> None:
        watch.on_progress(
            StageProgress(
                step=progress.step,
                max_steps=progress.max_steps,
                measured=_measured(progress, config.task.metric_name),
                looked=progress.looked,
                elapsed_s=progress.elapsed_s,
            )
        )

    result = train_start(config, folder, on_progress, watch)
    found = f"held-out {config.task.metric_name} {result.accuracy:.3f}"
    text = f"start: {folder} ({found} after {result.steps} steps, {result.elapsed_s:.0f} s)"
    return StageResult(target=folder, lines=(text,))


class _Looks:
    """Watches the accuracy during training, says when to stop, and lands on the target."""

    def __init__(
        self, config: Config, model: "PreTrainedModel", exam: Exam, on_progress: Callable[[SFTProgress], None], books: StageBooks
    ) -> None:
        self.step = 0
        self.target = config.sft.target_accuracy if exam.exact else math.inf
        """Accuracy to stop at; infinity: train all steps."""
        self._max_steps = config.sft.max_steps
        self._model, self._exam, self._on_progress, self._books = model, exam, on_progress, books
        self._began = time.monotonic()
        self._loss: float | None = None
        self._accuracy: float | None = None
        self._below = copy_weights(model)

    def count_step(self, step: int) -> None:
        """One optimizer step was taken."""
        self.step = step
        self._report(looked=False)

    def resume(self, step: int) -> None:
        """The training begins after `step`, before which the target was not reached."""
        self.step = step
        self._books.cut_after(step)
        self._below = copy_weights(self._model)

    def look(self, step: int, logs: Mapping[str, float]) -> bool:
        """Measure the accuracy; True: the target is reached, stop."""
        self._loss, self._accuracy = float(logs["loss"]), self._exam.accuracy(self._model)
        self._books.write(step, {"train/loss": self._loss, "held_out/accuracy": self._accuracy})
        self._report(looked=True)
        if self._accuracy >= self.target:
            return True
        self._below = copy_weights(self._model)
        return False

    def land(self) -> None:
        """Bring the model back to the target if the last look was above it by more than the tolerance."""
        if self._accuracy is not None and self._accuracy > self.target + LANDING_TOLERANCE:
            self._accuracy = land(self._model, self._exam, self._below, target=self.target)
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


def _make_trainer(config: Config, model: Any, tokenizer: Any, examples: dict[str, list[list[int]]], work: StageFolder) -> Any:
    """TRL's trainer of the start."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig as TrainerConfig
    from trl.trainer.sft_trainer import SFTTrainer

    given = arguments(config.sft, work, config.sft.max_steps)
    trainer_config = TrainerConfig(**given, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(model=model, args=trainer_config, train_dataset=Dataset.from_dict(examples), processing_class=tokenizer)


def _measured(progress: SFTProgress, metric_name: str) -> str:
    if progress.loss is None or progress.accuracy is None:
        return ""
    return f"loss {progress.loss:.3f}, held-out {metric_name} {progress.accuracy:.3f}"


def _settings(config: Config) -> dict[str, dict[str, Any]]:
    """All settings that decide the weights; those of `ADDED` where they are not as they were before there were such settings."""
    sft, default = asdict(config.sft), asdict(SFTConfig())
    model, default_model = asdict(config.model), asdict(ModelConfig())
    for key in ("path", *(key for key in ADDED_TO_MODEL if model[key] == default_model[key])):
        del model[key]
    # Sections of other tasks decide nothing.
    task = {key: value for key, value in asdict(config.task).items() if not isinstance(value, dict) or key == config.task.name}
    used = {key: sft[key] for key in DECIDING} | {key: sft[key] for key in ADDED if sft[key] != default[key]}
    return {"task": task, "model": model, "sft": used}


def _check_accuracy(accuracy: float, looks: _Looks) -> None:
    """Refuse a start that knows nothing, and warn about one that knows less than asked for."""
    if math.isinf(looks.target):
        return
    if accuracy == 0.0:
        raise RunError(
            f"the supervised start must answer some held-out problems right, got accuracy 0 after {looks.step} steps; "
            "raise sft.max_steps, or make the task easier (task.num_operands, task.max_operand)"
        )
    if accuracy < looks.target - 3 * LANDING_TOLERANCE:
        logger.warning(
            "the supervised start stops at held-out accuracy %.3f after %d steps, below sft.target_accuracy=%s; "
            "it is kept. Raise sft.max_steps to go on to the target",
            accuracy,
            looks.step,
            looks.target,
        )


def _save(config: Config, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", result: SFTResult, work: StageFolder) -> None:
    """Write the folder beside its place, then rename it: a reader sees a finished start or none."""
    model.save_pretrained(work.made)
    tokenizer.save_pretrained(work.made)
    facts = {**_settings(config), "accuracy": result.accuracy, "steps": result.steps, "elapsed_s": round(result.elapsed_s, 1)}
    (work.made / "start.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    work.finish()

"""What the trainers of TRL share here: their arguments, looks at held-out rows, checkpoints, and a stop that loses nothing."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (transformers types its methods partially.)

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from async_rlhf.config.stages import RewardModelConfig, SFTConfig
from async_rlhf.errors import StageStopped
from async_rlhf.stages.folder import WHOLE, StageFolder, step_of
from async_rlhf.stages.messages import StageWatch

if TYPE_CHECKING:
    from transformers import Trainer

ADAM_BETA2 = 0.95
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""Ours -> the trainer's name."""
KEPT_CHECKPOINTS = 2
"""The older one stays until the newer one is whole."""


class Steps(Protocol):
    """Who follows a training step by step."""

    def resume(self, step: int) -> None:
        """The training begins after `step`; the model has the weights of that step."""
        ...

    def count_step(self, step: int) -> None:
        """One optimizer step was taken."""
        ...

    def look(self, step: int, logs: Mapping[str, float]) -> bool:
        """Measure the model. True: stop, this is enough.

        Args:
            logs: of the trainer: mean `loss` since the last look, `grad_norm`, `learning_rate`.
        """
        ...


def arguments(settings: SFTConfig | RewardModelConfig, folder: StageFolder, max_steps: int) -> dict[str, Any]:
    """What SFTTrainer and RewardTrainer are told alike."""
    return {
        "output_dir": str(folder.trainer),
        "max_steps": max_steps,
        "per_device_train_batch_size": settings.batch_size // settings.gradient_accumulation,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": SCHEDULES[settings.schedule],
        "warmup_steps": min(settings.warmup_steps, max_steps),
        "adam_beta2": ADAM_BETA2,
        "logging_steps": min(settings.eval_every, max_steps),
        "seed": settings.seed,
        "max_length": None,
        "gradient_checkpointing": False,
        "use_cache": True,
        "use_cpu": settings.num_gpus == 0,
        "bf16": settings.precision == "bfloat16",
        "dataloader_pin_memory": settings.num_gpus > 0,
        "report_to": [],
        "save_strategy": "no",
        "save_total_limit": KEPT_CHECKPOINTS,
        "disable_tqdm": True,
    }


def fit(trainer: "Trainer", steps: Steps, folder: StageFolder, save_every: int, watch: StageWatch) -> None:
    """Train to the end, from the newest whole checkpoint if there is one.

    Args:
        save_every: optimizer steps between two checkpoints; 0: none but that of a stop.
    Raises:
        StageStopped: `watch` asked for it; a checkpoint is there.
    """
    from transformers import PrinterCallback

    checkpoint = folder.newest_checkpoint()
    if checkpoint is not None:
        watch.note(f"going on from step {step_of(checkpoint)}: {checkpoint}")
    callback = _make_callback(steps, folder, save_every, watch)
    trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if callback.stopped:
        raise StageStopped(f"stopped after {trainer.state.global_step} steps; the same command goes on from there")


def _make_callback(steps: Steps, folder: StageFolder, save_every: int, watch: StageWatch) -> Any:
    """The trainer's view of `steps`. TRL logs the mean loss every eval_every steps, which is when we look."""
    from transformers import TrainerCallback

    class StepsCallback(TrainerCallback):
        saved = 0
        stopped = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.saved = state.global_step
            steps.resume(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.count_step(state.global_step)
            # At the last step there is nothing left to go on with.
            if state.global_step < state.max_steps and watch.stopping():
                self.stopped = True
                control.should_training_stop = control.should_save = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            if steps.look(state.global_step, logs):
                # Finished, also where a signal came in the same step: there is nothing to go on with.
                self.stopped = control.should_save = False
                control.should_training_stop = True
            elif save_every and state.global_step < state.max_steps and state.global_step // save_every > self.saved // save_every:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.saved = state.global_step
            (folder.trainer / f"checkpoint-{state.global_step}" / WHOLE).touch()

    return StepsCallback()


def use_threads(num_cpus: float) -> None:
    """Compute with as many threads as the actor has CPUs; elsewhere the libraries' own choice would be all cores of the node."""
    import torch

    torch.set_num_threads(max(1, int(num_cpus)))


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Keep the libraries' own progress bars, and DeepSpeed's remark that there is no GPU, off the terminal."""
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging as transformers_logging

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    had_bars = transformers_logging.is_progress_bar_enabled()
    deepspeed_logger = logging.getLogger("DeepSpeed")
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    deepspeed_logger.addFilter(is_error)
    try:
        yield
    finally:
        deepspeed_logger.removeFilter(is_error)
        if had_bars:
            transformers_logging.enable_progress_bar()

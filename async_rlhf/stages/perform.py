"""Do a stage, in this very process."""

import json

from async_rlhf.stages.folder import TargetTakenError
from async_rlhf.stages.messages import StageJob, StageResult, StageWatch


def perform(job: StageJob, watch: StageWatch) -> StageResult:
    """Do the stage, from where an earlier attempt was killed.

    Raises:
        ConfigError: the target is taken, or settings or rows cannot work. RewardError, RunError: as the stage says.
        StageStopped: `watch` asked for it.
    """
    try:
        return _perform(job, watch)
    except TargetTakenError:
        # Another process made it while this one waited for the work folder.
        if job.cached and (made := finished(job)) is not None:
            return made
        raise


def finished(job: StageJob) -> StageResult | None:
    """The result where the cache has it; None: it has to be made."""
    if not job.cached:
        return None
    match job.kind:
        case "sft":
            from async_rlhf.sft import cached_start

            folder = cached_start(job.config)
            if folder is None:
                return None
            facts = json.loads((folder / "start.json").read_text(encoding="utf-8"))
            found = f"held-out {job.config.task.metric_name} {facts['accuracy']:.3f}"
            text = f"start: {folder} (in the cache; {found}; delete the folder to make it again)"
        case "reward_model":
            from async_rlhf.stages.reward_model import cached_reward_model

            folder = cached_reward_model(job.config)
            if folder is None:
                return None
            facts = json.loads((folder / "reward_model.json").read_text(encoding="utf-8"))
            accuracy = facts["end"]["accuracy"]
            text = f"reward model: {folder} (in the cache; held-out accuracy {accuracy:.3f}; delete the folder to make it again)"
        case "relabel":
            return None
    return StageResult(target=folder, lines=(text,))


def _perform(job: StageJob, watch: StageWatch) -> StageResult:
    match job.kind:
        case "sft" if job.config.sft.sources:
            from async_rlhf.stages.finetune import finetune

            return finetune(job.config, job.target, watch)
        case "sft":
            from async_rlhf.sft import make_start

            return make_start(job.config, job.target, watch)
        case "reward_model":
            from async_rlhf.stages.reward_model import make_reward_model

            return make_reward_model(job.config, job.target, watch)
        case "relabel":
            from async_rlhf.stages.relabel import relabel

            return relabel(job.config, job.target, watch)

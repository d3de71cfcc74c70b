"""Ranges and contradictions: what a config must satisfy before any work starts."""

import dataclasses
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

from async_rlhf.config.algorithms import AlgorithmConfig, CriticConfig
from async_rlhf.config.fields import named_section
from async_rlhf.config.lora import LoraConfig
from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.config.schema import Config
from async_rlhf.config.transports import transport_contradictions
from async_rlhf.errors import ConfigError

_LIMITS = {"ge": (">=", operator.ge), "gt": (">", operator.gt), "le": ("<=", operator.le), "lt": ("<", operator.lt)}

_ZERO_MEANS = {"max_staleness": "; use 0 for synchronous training"}


def check_config(config: Config) -> None:
    """Raise ConfigError for the first value out of range or pair of settings that contradict."""
    for key, value, metadata in _numbers(config):
        _check_range(key, value, metadata)
    for message in _contradictions(config):
        raise ConfigError(message)


def warnings_of(config: Config) -> list[str]:
    """Settings that are allowed, and that most users do not want."""
    warnings: list[str] = []
    if config.algorithm.corrects and config.algorithm.correction == "none" and config.max_staleness > 0:
        warnings.append(
            "algorithm.correction none trains stale data as if the current policy had sampled it: an ablation; truncated is the default"
        )
    if config.reward.normalize and config.algorithm.name in ("dpo", "bok", "listwise"):
        warnings.append(f"reward.normalize changes nothing for {config.algorithm.name}, which looks at the order of the scores alone")
    if config.reward.num_gpus and not config.reward.count:
        warnings.append("reward.num_gpus changes nothing: the scorers compute the rewards; set reward.count, or scorer.num_gpus")
    if config.queue.max_replacements_per_batch >= 0 and config.queue.ties != "replace" and config.max_replacements_per_batch == 0:
        warnings.append("queue.max_replacements_per_batch changes nothing: tied groups are kept; set queue.ties=replace to replace them")
    lora = config.learner.lora
    if not lora.rank and lora != LoraConfig():
        warnings.append("learner.lora changes nothing while learner.lora.rank is 0: all weights are trained")
    return warnings


def _numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float, dict[str, float]]]:
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{prefix}{item.name}.")
        elif named_section(item.type):
            for name, section_of_name in value.items():
                yield from _numbers(section_of_name, f"{prefix}{item.name}.{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{item.name}", value, dict(item.metadata)


def _check_range(key: str, value: float, limits: dict[str, float]) -> None:
    expected = " and ".join(f"{_LIMITS[name][0]} {limit:g}" for name, limit in limits.items())
    inside = (isinstance(value, int) or math.isfinite(value)) and all(_LIMITS[name][1](value, limit) for name, limit in limits.items())
    if not inside:
        raise ConfigError(f"{key} must be {expected}, got {value}{_ZERO_MEANS.get(key, '')}")


def _contradictions(config: Config) -> Iterator[str]:
    yield from _group_contradictions(config)
    yield from _algorithm_contradictions(config)
    yield from _batch_contradictions(config)
    yield from _stage_contradictions(config)
    yield from _evaluation_contradictions(config)
    yield from _prompt_contradictions(config)
    yield from _reward_contradictions(config)
    yield from _placement_contradictions(config)
    yield from transport_contradictions(config)
    if config.deterministic and (config.max_staleness != 0 or config.queue.order != "ticket"):
        yield (
            "deterministic: true needs max_staleness 0 and queue.order ticket, got "
            f"max_staleness {config.max_staleness} and queue.order {config.queue.order}; "
            "asynchronous batches depend on timing"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.run.name):
        yield f"run.name must be letters, digits, '.', '_' and '-', starting with a letter or digit, got {config.run.name!r}"
    if not config.weights.rereads and config.generator.engine != "vllm":
        yield (
            f"weights.on_update keep_cache keeps what vLLM has cached, got generator.engine {config.generator.engine}, which has no cache; "
            "set weights.on_update=keep"
        )
    if config.learner.lora.publishes_adapters and config.learner.lora.rank > 512:
        yield (
            f"learner.lora.publish adapter takes ranks up to 512, which is as far as vLLM goes, got {config.learner.lora.rank}; "
            "set learner.lora.publish=merged"
        )
    if config.generator.max_new_tokens >= config.generator.max_model_len:
        yield (
            f"generator.max_new_tokens ({config.generator.max_new_tokens}) leaves no room for a prompt in "
            f"generator.max_model_len ({config.generator.max_model_len}); raise max_model_len"
        )
    if config.reward.missing_eos_penalty is not None and config.reward.missing_eos_percentile is not None:
        yield (
            f"reward.missing_eos_penalty ({config.reward.missing_eos_penalty:g}) and reward.missing_eos_percentile "
            f"({config.reward.missing_eos_percentile:g}) both say what a cut completion scores; set one of them to null"
        )
    if config.queue.lease_s <= config.timeouts.generate_s:
        yield (
            f"queue.lease_s ({config.queue.lease_s:g}) must exceed timeouts.generate_s ({config.timeouts.generate_s:g}): a ticket that "
            "expires while its completions are still being sampled would go out again for ever; raise queue.lease_s"
        )
    if not config.model.path and config.model.hidden_size % config.model.num_heads:
        yield f"model.hidden_size ({config.model.hidden_size}) must be a multiple of model.num_heads ({config.model.num_heads})"


def _stage_contradictions(config: Config) -> Iterator[str]:
    for key, stage in (("sft", config.sft), ("reward_model", config.reward_model)):
        if stage.batch_size % stage.gradient_accumulation:
            yield (
                f"{key}.batch_size ({stage.batch_size}) must be a multiple of {key}.gradient_accumulation "
                f"({stage.gradient_accumulation}), which splits it; nearest: {key}.batch_size="
                f"{max(1, round(stage.batch_size / stage.gradient_accumulation)) * stage.gradient_accumulation}"
            )


_NEEDS_SIBLINGS = {
    "dpo": "DPO takes the best and the worst completion of a prompt",
    "rloo": "RLOO measures each completion against the mean of its siblings",
    "grpo": "GRPO measures each completion against its group's mean and spread",
    "bok": "BoK takes the best of the completions of a prompt",
    "listwise": "listwise takes the ranking of the completions of a prompt",
}


def _group_contradictions(config: Config) -> Iterator[str]:
    name, num_completions = config.algorithm.name, config.completions_per_prompt
    if config.algorithm.compares and num_completions < 2:
        why = _NEEDS_SIBLINGS.get(name, f"{name} compares the completions of a prompt")
        yield f"{why}: completions_per_prompt must be >= 2, got {num_completions}; set completions_per_prompt=2"
    if config.generator.max_inflight < num_completions:
        yield (
            f"generator.max_inflight ({config.generator.max_inflight}) must hold at least one group of "
            f"completions_per_prompt ({num_completions}) completions"
        )


def _algorithm_contradictions(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.name == "dpo" and algorithm.dpo.loss != "sigmoid" and algorithm.dpo.label_smoothing:
        yield "algorithm.dpo.label_smoothing belongs to algorithm.dpo.loss sigmoid; set it to 0 or choose sigmoid"
    if algorithm.name != "ppo" and algorithm.ppo.critic != CriticConfig():
        yield (
            f"algorithm.ppo.critic belongs to PPO, the only algorithm with a critic, but algorithm.name is {algorithm.name}; "
            "set algorithm=ppo, or leave the critic's settings out"
        )
    default = AlgorithmConfig()
    given = [key for key in ("correction", "correction_cap") if getattr(algorithm, key) != getattr(default, key)]
    if given and not algorithm.corrects:
        yield (
            f"algorithm.{given[0]} weights the ratios of PPO, RLOO and GRPO, but {algorithm.name} has none, got "
            f"{getattr(algorithm, given[0])}; leave it out, or bound the age of the data by max_staleness"
        )
    if algorithm.correction not in ("auto", "truncated", "masked") and algorithm.correction_cap != default.correction_cap:
        yield (
            f"algorithm.correction_cap belongs to the corrections truncated and masked, got {algorithm.correction_cap:g} with "
            f"{algorithm.correction}; leave it out"
        )


def _evaluation_contradictions(config: Config) -> Iterator[str]:
    evaluation = config.evaluation
    if evaluation.against and evaluation.winrate == "off":
        yield "evaluation.against names a model to compare with, but evaluation.winrate is off; set it to metric, reward or judge"
    if evaluation.winrate == "judge" and not (evaluation.judge.url and evaluation.judge.model):
        yield (
            "evaluation.winrate judge needs evaluation.judge.url and evaluation.judge.model, got "
            f"{evaluation.judge.url!r} and {evaluation.judge.model!r}"
        )


def _prompt_contradictions(config: Config) -> Iterator[str]:
    prompts, room = config.prompts, config.generator.max_model_len - config.generator.max_new_tokens
    if prompts.sources and config.task.name != "dataset":
        yield f"prompts.sources are read by task.name dataset alone, got task.name {config.task.name}; set task.name=dataset"
    for name, source in prompts.sources.items():
        if source.live and source.streaming:
            yield f"prompts.sources.{name} is live, and so never read as a stream; leave streaming out"
        if source.path.startswith("sqlite:") and not source.live:
            yield f"prompts.sources.{name}: a table is read row by row, as live sources are; set prompts.sources.{name}.live=true"
    if prompts.max_tokens > room:
        yield (
            f"prompts.max_tokens ({prompts.max_tokens}) must leave room for generator.max_new_tokens ({config.generator.max_new_tokens}) "
            f"in generator.max_model_len ({config.generator.max_model_len}): at most {room}"
        )
    if 0 < prompts.max_tokens < prompts.min_tokens:
        yield f"prompts.max_tokens ({prompts.max_tokens}) must be at least prompts.min_tokens ({prompts.min_tokens})"


def _batch_contradictions(config: Config) -> Iterator[str]:
    size, ranks, parts = config.batch_groups, config.learner.num_ranks, config.algorithm.minibatches_per_batch
    if size % (ranks * parts):
        by = f"learner.num_ranks ({ranks})"
        if parts > 1:
            by = f"learner.num_ranks x algorithm.minibatches_per_batch ({ranks} x {parts})"
        yield (
            f"batch_groups ({size}) must be divisible by {by}; "
            f"nearest: batch_groups={max(ranks * parts, round(size / (ranks * parts)) * ranks * parts)}"
        )
    if config.learner.precision == "bfloat16" and config.learner.zero_stage == 0:
        yield "learner.precision bfloat16 needs learner.zero_stage 1, 2 or 3 (stage 0 trains without an fp32 master copy); set zero_stage=1"


def _placement_contradictions(config: Config) -> Iterator[str]:
    generator = config.generator
    workers, gpus = generator.tensor_parallel_size, generator.num_gpus
    if workers > 1 and generator.engine != "vllm":
        yield f"generator.tensor_parallel_size ({workers}) belongs to generator.engine vllm, got {generator.engine}; set it to 1"
    if workers > 1 and gpus not in (0, workers):
        yield (
            f"generator.tensor_parallel_size ({workers}) needs as many GPUs, got generator.num_gpus {gpus:g}; "
            f"set generator.num_gpus={workers} (0: on CPUs)"
        )
    if workers == 1 and gpus > 1:
        yield (
            f"generator.num_gpus ({gpus:g}) is more than a generator of generator.tensor_parallel_size 1 can use; "
            f"set both to {math.ceil(gpus)}, or take more generators of one GPU each"
        )


_OF_KIND = {"function": ("function", "processes"), "model": ("path", "max_length"), "http": ("url", "token_env"), "judge": ("judge",)}


def _reward_contradictions(config: Config) -> Iterator[str]:
    if config.reward.function and config.reward.parts:
        yield (
            f"reward.function ({config.reward.function}) and reward.parts ({', '.join(config.reward.parts)}) both say what the reward is; "
            "make the function a part, or leave one of them out"
        )
    for name, part in config.reward.parts.items():
        yield from _part_contradictions(f"reward.parts.{name}", name, part, config)


def _part_contradictions(key: str, name: str, part: RewardPartConfig, config: Config) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        yield f"the name of a reward part must be letters, digits, '_' and '-', starting with a letter or digit, got {name!r}"
    for kind, settings in _OF_KIND.items():
        given = [setting for setting in settings if getattr(part, setting) != getattr(RewardPartConfig(), setting)]
        if given and kind != part.kind:
            yield f"{key}.{given[0]} belongs to kind {kind}, but {key}.kind is {part.kind}; set {key}.kind={kind}, or leave it out"
    bounded = part.kind in ("http", "judge") or (part.kind == "function" and part.processes > 0)
    if bounded and part.longest_call_s >= config.timeouts.score_s:
        yield (
            f"one call of {key} may take {part.longest_call_s:g} s (1 + {part.retries} attempts of {part.deadline_s:g}, "
            f"and the waits between them), but a scorer that is silent for timeouts.score_s ({config.timeouts.score_s:g}) is replaced; "
            "lower deadline_s, retries or backoff_s, or raise timeouts.score_s"
        )
    pairwise = part.kind == "judge" and part.judge.mode == "pairwise"
    if pairwise and config.completions_per_prompt < 2:
        yield (
            f"{key}.judge.mode pairwise compares the completions of a prompt: completions_per_prompt must be >= 2, got "
            f"{config.completions_per_prompt}; use pointwise"
        )

"""Every metric, declared once: its key, how it is reduced over microbatches and ranks, and what it means.

Keys are `stage/quantity_unit`. The learner reduces `mean` metrics as sums and weights over the whole minibatch, never as
averages of averages; over the optimizer steps of an update they are a plain mean.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from async_rlhf.scores import ScoreMoments
from async_rlhf.types import Batch

Reduction = Literal["mean", "last", "max"]


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is reduced over the optimizer steps of an update, and what it says."""

    reduction: Reduction
    meaning: str


EVALUATED: Mapping[str, Metric] = {
    key: Metric("last", meaning)
    for key, meaning in {
        "evaluate/score": "mean score of the greedy completions by the task's own metric",
        "evaluate/score_low": "its 95 % interval: Wilson's where every score is 0 or 1, else the bootstrap's over prompts",
        "evaluate/score_high": "likewise",
        "evaluate/score_change": "mean over prompts of score minus the same prompt's score at the start",
        "evaluate/score_change_low": "its 95 % interval, bootstrap over prompts",
        "evaluate/score_change_high": "likewise",
        "evaluate/score_change_p": "sign test of the prompts that got better against those that got worse",
        "evaluate/reward": "mean reward of the greedy completions, where the run's reward is not the metric",
        "evaluate/reward_low": "its 95 % interval",
        "evaluate/reward_high": "likewise",
        "evaluate/length_tokens": "tokens per greedy completion",
        "evaluate/stopped_share": "share of greedy completions that ended with the end-of-sequence token",
        "evaluate/cut_share": "share of greedy completions cut by the length limit",
        "evaluate/winrate": "wins plus half the ties, as a share of the prompts",
        "evaluate/winrate_low": "its 95 % interval: Wilson's without ties, else the bootstrap's over prompts",
        "evaluate/winrate_high": "likewise",
        "evaluate/winrate_ties": "prompts on which neither completion was better",
        "evaluate/winrate_p": "sign test of wins against losses",
        "evaluate/sampled_score": "mean score of the completions sampled at the training temperature",
        "evaluate/sampled_score_low": "its 95 % interval",
        "evaluate/sampled_score_high": "likewise",
        "evaluate/sampled_reward": "mean reward of the sampled completions, where the run's reward is not the metric",
        "evaluate/sampled_reward_low": "its 95 % interval",
        "evaluate/sampled_reward_high": "likewise",
        "evaluate/sampled_length_tokens": "tokens per sampled completion",
        "evaluate/sampled_stopped_share": "share of sampled completions that ended with the end-of-sequence token",
        "evaluate/sampled_cut_share": "share of sampled completions cut by the length limit",
        "evaluate/kl_nats": "KL(policy || reference) per sampled completion, k1 estimate",
        "evaluate/kl_error_nats": "its standard error over completions",
        "evaluate/kl_nats_low": "1.96 standard errors below",
        "evaluate/kl_nats_high": "1.96 standard errors above",
        "evaluate/kl_token_nats": "the same divergence per token: all nats over all tokens",
    }.items()
}
"""Of an evaluation, not of an update; see evaluation.py."""

METRICS: Mapping[str, Metric] = {
    "reward/mean": Metric("mean", "mean score of all completions sampled since the last batch, replaced ties included"),
    "reward/batch_mean": Metric("mean", "mean score of the batch's completions"),
    "reward/batch_std": Metric("mean", "standard deviation of the scores over the batch"),
    "rollout/kl_k1_nats": Metric("mean", "KL(behavior || reference) per completion, k1 estimate"),
    "rollout/length_tokens": Metric("mean", "tokens per completion"),
    "rollout/cut_share": Metric("mean", "share of completions cut by the length limit"),
    "rollout/tied_groups": Metric("mean", "groups in the batch whose scores are all equal"),
    "queue/staleness_mean": Metric("mean", "update minus version of each group's oldest token, in updates"),
    "queue/staleness_max": Metric("mean", "the largest of them"),
    "queue/staleness_optimizer_steps_mean": Metric("mean", "the same in optimizer steps"),
    "queue/batch_digest": Metric("mean", "CRC-32 of the batch's prompt ids in order: equal digests, equal prompts"),
    "queue/depth_groups": Metric("mean", "finished groups left waiting after the batch was taken"),
    "queue/leased_groups": Metric("mean", "groups with the generators then, or lost and waiting for a new one: tickets that are out"),
    "queue/scoring_groups": Metric("mean", "sampled groups then that were with a scorer, or waited for one"),
    "queue/wait_s": Metric("mean", "the learner's wait for this batch, until it was decided"),
    "train/loss": Metric("mean", "loss over the global minibatch"),
    "train/grad_norm": Metric("mean", "gradient norm before clipping"),
    "train/learning_rate": Metric("last", "of the update's last optimizer step"),
    "train/take_s": Metric("mean", "from the batch's decision until the ranks begin: the shards are made, and move to them"),
    "train/step_s": Metric("mean", "seconds inside train_step, slowest rank"),
    "train/prepare_s": Metric("mean", "part of step_s, slowest rank: counts, proximal log-probabilities, the critic's values"),
    "train/forward_backward_s": Metric("mean", "part of step_s, slowest rank: forwards and backwards, of the critic too"),
    "train/optimizer_s": Metric("mean", "part of step_s, slowest rank: gradient norm and optimizer steps, of the critic too"),
    "train/mfu_share": Metric("mean", "model FLOPs utilisation, see learners/flops.py; absent where the device's peak is not known"),
    "train/tokens_per_s": Metric("mean", "prompt and completion tokens trained per second of train_step"),
    "train/idle_share": Metric("mean", "share of the update's wall time that the learner did not train"),
    "policy/entropy_nats": Metric("mean", "entropy per trained token"),
    "policy/kl_k1_nats": Metric(
        "mean", "log policy - log reference per trained completion; KL's k1 estimate as far as the samples are the policy's"
    ),
    "policy/kl_k3_nats": Metric("mean", "the same, k3 estimate"),
    "policy/clip_share": Metric("mean", "share of ratios that the clip holds"),
    "mismatch/kl_k1_nats": Metric("mean", "KL(behavior || proximal) per completion: staleness and engine mismatch, k1 estimate"),
    "mismatch/kl_k3_nats": Metric("mean", "the same, k3 estimate"),
    "mismatch/ratio_mean": Metric("mean", "C = proximal / behavior per completion; 1 in expectation"),
    "mismatch/ratio_square": Metric("mean", "mean of C squared"),
    "mismatch/ratio_max": Metric("max", "the largest C"),
    "mismatch/ess_share": Metric("mean", "effective sample size if every completion were weighted by C, as a share of their number"),
    "correction/weight": Metric("mean", "mean correction weight w, per ratio"),
    "correction/weight_square": Metric("mean", "mean of w squared"),
    "correction/ess_share": Metric("mean", "effective sample size of the weights, (sum w)^2 / (n sum w^2)"),
    "dpo/margin": Metric("mean", "beta h over the pairs"),
    "dpo/accuracy": Metric("mean", "share of pairs with h > 0"),
    "dpo/chosen_gain_nats": Metric("mean", "policy minus reference log-probability of the chosen completions"),
    "dpo/rejected_gain_nats": Metric("mean", "the same for the rejected ones"),
    "listwise/margin": Metric("mean", "beta (policy - reference) of the better minus that of the worse, over all ranked pairs"),
    "listwise/accuracy": Metric("mean", "share of these pairs with a positive margin"),
    "bok/nll_nats": Metric("mean", "negative log-likelihood of a trained completion"),
    "value/mean": Metric("mean", "the critic's value per completion token"),
    "value/clip_share": Metric("mean", "share of values that the value clip holds"),
    "value/loss": Metric("mean", "the critic's loss over the global minibatch, vf_coef included"),
    "value/grad_norm": Metric("mean", "its gradient norm before clipping"),
    "value/learning_rate": Metric("last", "of its last optimizer step"),
    "value/return_mean": Metric("mean", "return per completion token: what the critic should say"),
    "value/return_std": Metric("mean", "its standard deviation over the batch"),
    "value/advantage_std": Metric("mean", "standard deviation of the advantages before whitening"),
    "value/explained_variance": Metric("mean", "1 - Var(return - value) / Var(return), values from before the update"),
    "generate/tokens_per_s": Metric("mean", "completion tokens sampled per second, all generators, since the last update"),
    "generate/groups_per_s": Metric("mean", "groups sampled per second, all generators"),
    "generate/idle_share": Metric("mean", "share of that time that the generators did not spend in engine steps"),
    "generate/generators": Metric("mean", "generators that took part in that time"),
    "generate/wait_ticket_share": Metric(
        "mean", "share of it in which a generator with room for more, be it to wait for a place, waited for tickets"
    ),
    "generate/running_requests": Metric("mean", "completions in the engines' batches, all generators, mean over that time"),
    "generate/waiting_requests": Metric("mean", "completions in the engines without a place in a batch, likewise"),
    "generate/kv_use_share": Metric("mean", "share of the key/value cache in use, mean over the engines' steps"),
    "generate/work_s": Metric("mean", "engine steps since the last update, all generators: processor seconds; on a GPU wall time"),
    "generate/step_fixed_s": Metric("mean", "such seconds of a step, whatever its batch, mean over generators; a fit of about 1,000 steps"),
    "generate/step_completion_s": Metric("mean", "what each completion in the batch adds to them"),
    "generate/step_prompt_s": Metric("mean", "what each completion that joins the batch adds besides: its prompt is read"),
    "generate/cpu_s": Metric(
        "mean", "processor seconds of the generators since the last update; this and its like: if on the driver's node"
    ),
    "score/cpu_s": Metric("mean", "the same of the scorers"),
    "reward/cpu_s": Metric("mean", "the same of the reward actors"),
    "train/cpu_s": Metric("mean", "the same of the learner ranks"),
    "queue/cpu_s": Metric("mean", "the same of the queue"),
    "time/driver_cpu_s": Metric("mean", "the same of the driver, the broadcaster, and the processes of the run's own Ray"),
    "score/groups_per_s": Metric("mean", "groups scored per second, all scorers"),
    "score/idle_share": Metric("mean", "share of the scorers' time since the last update in which nobody had called them"),
    "score/latency_s": Metric("mean", "seconds per call of a scorer for training, as the driver sees it; absent where none ended"),
    "reward/idle_share": Metric("mean", "the same of the reward actors, where there are any"),
    "reward/latency_s": Metric("mean", "likewise"),
    "weights/export_s": Metric("mean", "snapshot of the policy and its transfer to the broadcaster"),
    "weights/gather_s": Metric("mean", "part of it: canary, gathering and copying in the learner"),
    "weights/transfer_s": Metric("mean", "slowest generator's last transfer, from the request to the weights in its process"),
    "weights/install_s": Metric("mean", "slowest generator's last install, canary included"),
    "weights/pause_s": Metric("mean", "part of it: the engine could not step because its weights were being replaced"),
    "weights/canary_s": Metric("mean", "part of it: the canary's own sampling"),
    "time/update_s": Metric("mean", "wall time since the last update, or the first ticket"),
    "supervision/restarts": Metric("mean", "restarts of any part of the crew by this driver, so far"),
    "weights/canary_error_nats": Metric("mean", "largest canary error of the last installs"),
    **EVALUATED,
}

PART = "reward/part/"
"""Begins the keys of the parts of a reward, whose names the user gives."""

FAMILIES: Mapping[str, Metric] = {
    PART: Metric("mean", "mean of one part of the reward over the batch's completions, before its weight; NAME.cut: share that was cut"),
}
"""Metrics whose last word is a name from the config: what their keys begin with."""


def declaration(key: str) -> Metric:
    """How a metric is declared, by its key or by its family.

    Raises:
        KeyError: it is not.
    """
    family = next((declared for prefix, declared in FAMILIES.items() if key.startswith(prefix) and key != prefix), None)
    return family or METRICS[key]


_REDUCE: Mapping[Reduction, Callable[[Sequence[float]], float]] = {
    "mean": lambda series: float(np.mean(series)),
    "last": lambda series: series[-1],
    "max": max,
}


def derive(means: Mapping[str, float]) -> dict[str, float]:
    """Add the metrics that are functions of reduced means."""
    result = dict(means)
    for share, mean, mean_square in (
        ("mismatch/ess_share", "mismatch/ratio_mean", "mismatch/ratio_square"),
        ("correction/ess_share", "correction/weight", "correction/weight_square"),
    ):
        if mean in means:
            result[share] = means[mean] ** 2 / means[mean_square] if means[mean_square] else 0.0
    return result


def over_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One value per key over an update's optimizer steps, by its declared reduction.

    Raises:
        KeyError: a key that is not declared.
    """
    keys = {key for step in steps for key in step}
    values = {key: [step[key] for step in steps if key in step] for key in sorted(keys)}
    return {key: _REDUCE[declaration(key).reduction](series) for key, series in values.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSummary:
    """What the driver needs to know of a batch; the batch itself goes from the queue to the ranks."""

    update: int
    num_groups: int
    num_completions: int
    num_completion_tokens: int
    ticket_ids: tuple[int, ...]
    prompt_ids: tuple[str, ...]
    staleness_max: int
    """The largest staleness of any token in the batch, updates."""
    metrics: Mapping[str, float]
    staleness: tuple[int, ...] = ()
    """Of each group, updates."""
    moments: ScoreMoments = field(default_factory=ScoreMoments)
    """Of all scores up to this batch, it included."""


def summarize(batch: Batch, sampled_scores: Sequence[np.ndarray]) -> BatchSummary:
    """The batch in numbers: rewards, KL to the reference, lengths, ties and staleness, over all K completions.

    Args:
        sampled_scores: [K] scores of each group that came in since the last batch; empty: the batch's own.
    """
    rollouts = [rollout for scored in batch.groups for rollout in scored.group.rollouts]
    behavior = np.concatenate([rollout.behavior_logprobs for rollout in rollouts])
    reference = np.concatenate([logprobs for scored in batch.groups for logprobs in scored.reference_logprobs])
    scores = np.concatenate([scored.scores for scored in batch.groups])
    lengths = np.array([len(rollout.completion_ids) for rollout in rollouts])
    staleness = batch.staleness
    prompt_ids = tuple(scored.group.ticket.prompt.prompt_id for scored in batch.groups)
    return BatchSummary(
        update=batch.update,
        num_groups=len(batch.groups),
        num_completions=len(rollouts),
        num_completion_tokens=int(lengths.sum()),
        ticket_ids=tuple(scored.group.ticket.ticket_id for scored in batch.groups),
        prompt_ids=prompt_ids,
        staleness_max=max(staleness),
        staleness=staleness,
        metrics={
            "reward/mean": float(np.concatenate(sampled_scores).mean() if sampled_scores else scores.mean()),
            "reward/batch_mean": float(scores.mean()),
            "reward/batch_std": float(scores.std()),
            **_part_means(batch),
            "rollout/kl_k1_nats": float(behavior.sum(dtype=np.float64) - reference.sum(dtype=np.float64)) / len(rollouts),
            "rollout/length_tokens": float(lengths.mean()),
            "rollout/cut_share": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
            "rollout/tied_groups": float(sum(scored.tied for scored in batch.groups)),
            "queue/staleness_mean": float(np.mean(staleness)),
            "queue/staleness_max": float(max(staleness)),
            "queue/batch_digest": float(zlib.crc32("\n".join(prompt_ids).encode())),
        },
    )


def _part_means(batch: Batch) -> dict[str, float]:
    """The mean of each part of the reward, over the completions that have it."""
    names = dict.fromkeys(name for scored in batch.groups for name in scored.reward_parts)
    of_groups = {name: [scored.reward_parts[name] for scored in batch.groups if name in scored.reward_parts] for name in names}
    return {f"{PART}{name}": float(np.concatenate(values).mean(dtype=np.float64)) for name, values in of_groups.items()}

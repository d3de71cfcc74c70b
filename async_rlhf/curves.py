"""What the report draws: one table of curves, and one curve per part of the reward."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from async_rlhf.metrics import PART

PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(?:\.cut)?")
"""What a part of the reward may be called: anything else in metrics.jsonl was not written by a run."""


@dataclass(frozen=True, slots=True)
class Line:
    """One metric in a curve."""

    key: str
    label: str
    colour: Literal["first", "second"] = "first"
    peaks: bool = False
    """Thinning keeps each stretch's maximum instead of its last value."""
    banded: bool = False
    """Shades the 95 % interval, which the rows hold under the key with `_low` and `_high`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One figure over the policy version."""

    name: str
    title: str
    y_label: str
    """Quantity and unit."""
    caption: str
    """One sentence: how to read it."""
    lines: tuple[Line, ...]
    smoothed: bool = False
    """Adds a running mean; the values themselves turn pale."""
    signed: bool = False
    """May fall below zero; else the axis starts there."""
    percent: bool = False
    bounded: bool = False
    """Draws the staleness bound."""
    level: float | None = None
    """A value to compare with, in the axis' unit: a dashed line."""
    level_label: str = ""
    only_where_measured: bool = False
    """Left out where no row has its metrics: it belongs to some algorithms only."""


CURVES = (
    Curve(
        name="reward",
        title="Reward",
        y_label="score per completion",
        caption="Higher is better: pale is each batch's mean score, bold its running mean.",
        signed=True,
        lines=(Line("reward/mean", "batch mean"),),
        smoothed=True,
    ),
    Curve(
        name="kl",
        title="KL to the start",
        y_label="KL (k1), nats per completion",
        caption="How far the policy went from the frozen start: a steep rise without more reward means over-optimization.",
        signed=True,
        lines=(Line("rollout/kl_k1_nats", "sampling policy"), Line("policy/kl_k1_nats", "trained policy", "second")),
    ),
    Curve(
        name="entropy",
        title="Policy entropy",
        y_label="entropy, nats per token",
        caption="How much choice is left in each token: a fall to zero means that the policy stopped exploring.",
        lines=(Line("policy/entropy_nats", "trained policy"),),
    ),
    Curve(
        name="staleness",
        title="Staleness",
        y_label="staleness, updates",
        caption="Updates made between sampling and training of a group: the maximum must never rise above the dashed bound.",
        lines=(Line("queue/staleness_max", "maximum", "second", peaks=True), Line("queue/staleness_mean", "mean")),
        bounded=True,
    ),
    Curve(
        name="throughput",
        title="Throughput",
        y_label="tokens per second",
        caption="Completion tokens sampled per second, and all tokens trained per second of training alone: steady is healthy.",
        lines=(Line("generate/tokens_per_s", "generators"), Line("train/tokens_per_s", "learner", "second")),
    ),
    Curve(
        name="idle",
        title="Idle shares",
        y_label="idle, % of wall time",
        caption="The side that idles waits for the other one: give hardware to the side that does not.",
        lines=(Line("generate/idle_share", "generators"), Line("train/idle_share", "learner", "second")),
        percent=True,
    ),
    Curve(
        name="depth",
        title="Queue depth",
        y_label="waiting groups",
        caption="Finished groups left waiting after the batch was taken: zero means that the learner is faster than the generators.",
        lines=(Line("queue/depth_groups", "groups"),),
    ),
    Curve(
        name="wait",
        title="Learner wait",
        y_label="wait per update, s",
        caption="Seconds that the learner waited for its batch: time in which it could have trained.",
        lines=(Line("queue/wait_s", "wait"),),
    ),
    Curve(
        name="loss",
        title="Training loss",
        y_label="loss (no unit)",
        caption="Pale is each update's loss, bold its running mean: look for jumps, its level alone says little here.",
        signed=True,
        lines=(Line("train/loss", "loss"),),
        smoothed=True,
    ),
    Curve(
        name="grad_norm",
        title="Gradient norm",
        y_label="L2 norm (no unit)",
        caption="Before clipping: spikes warn of instability, and zero means that nothing was learned.",
        lines=(Line("train/grad_norm", "norm", peaks=True),),
    ),
    Curve(
        name="install",
        title="Weight install",
        y_label="install time, s",
        caption="Seconds that the slowest generator needed for its last install, canary included: it samples nothing meanwhile.",
        lines=(Line("weights/install_s", "slowest generator", peaks=True),),
    ),
    Curve(
        name="length",
        title="Completion length",
        y_label="tokens per completion",
        caption="A drift to the length limit, or to nearly nothing, often shows a reward that is being gamed.",
        lines=(Line("rollout/length_tokens", "batch mean"),),
    ),
    Curve(
        name="mismatch",
        title="Age of the data",
        y_label="KL(behavior || proximal), nats per completion",
        caption="How far the policy that sampled was from the one that trained: staleness and differences of the engines together.",
        signed=True,
        lines=(Line("mismatch/kl_k1_nats", "k1"), Line("mismatch/kl_k3_nats", "k3", "second")),
    ),
    Curve(
        name="ess",
        title="Effective sample size",
        y_label="share of the batch, %",
        caption="What is left of the batch when its completions are weighted for their age: low means too stale.",
        percent=True,
        lines=(Line("mismatch/ess_share", "weighted by the full ratio"), Line("correction/ess_share", "as corrected", "second")),
    ),
    Curve(
        name="clip",
        title="Clipped ratios",
        y_label="share of ratios, %",
        caption="Ratios held by the clip teach nothing: much more than a fifth means steps that are too large, or too many per batch.",
        percent=True,
        lines=(Line("policy/clip_share", "policy"), Line("value/clip_share", "critic", "second")),
        only_where_measured=True,
    ),
    Curve(
        name="critic",
        title="Critic",
        y_label="explained variance",
        caption="How much of the returns' variance the critic foresees: towards 1 is good, below 0 is worse than a constant.",
        signed=True,
        lines=(Line("value/explained_variance", "explained variance"),),
        only_where_measured=True,
    ),
    Curve(
        name="preference",
        title="Preference accuracy",
        y_label="share of pairs, %",
        caption="Pairs that the policy already ranks as their scores do, measured before each update.",
        percent=True,
        lines=(Line("dpo/accuracy", "best over worst"), Line("listwise/accuracy", "all pairs", "second")),
        only_where_measured=True,
    ),
)

EVALUATION_CURVES = (
    Curve(
        name="evaluated-score",
        title="Score on held-out prompts",
        y_label="score per completion",
        caption="By the task's own metric, on prompts that are never trained; shaded: 95 % intervals over the prompts.",
        signed=True,
        lines=(Line("evaluate/score", "greedy", banded=True), Line("evaluate/sampled_score", "sampled", "second", banded=True)),
    ),
    Curve(
        name="evaluated-reward",
        title="Trained reward on held-out prompts",
        y_label="reward per completion",
        caption="What training raises: a reward that goes on rising while the score falls is being gamed.",
        signed=True,
        lines=(Line("evaluate/reward", "greedy", banded=True), Line("evaluate/sampled_reward", "sampled", "second", banded=True)),
        only_where_measured=True,
    ),
    Curve(
        name="evaluated-winrate",
        title="Win-rate",
        y_label="wins and half the ties, %",
        caption="Greedy completions against the opponent's, prompt by prompt; shaded: the 95 % interval.",
        percent=True,
        level=50.0,
        level_label="even",
        lines=(Line("evaluate/winrate", "policy", banded=True),),
        only_where_measured=True,
    ),
    Curve(
        name="evaluated-kl",
        title="KL to the reference",
        y_label="KL, nats per completion",
        caption="Over completions sampled from held-out prompts at the training temperature; shaded: 1.96 standard errors.",
        signed=True,
        lines=(Line("evaluate/kl_nats", "policy", banded=True),),
        only_where_measured=True,
    ),
    Curve(
        name="evaluated-length",
        title="Length of held-out completions",
        y_label="tokens per completion",
        caption="A win-rate that rises together with the length may be won by length alone.",
        lines=(Line("evaluate/length_tokens", "greedy"), Line("evaluate/sampled_length_tokens", "sampled", "second")),
    ),
)


def part_curves(rows: Sequence[Mapping[str, float]]) -> tuple[Curve, ...]:
    """One curve per part of the reward that any of the rows has; shares of cut texts that stay 0 are left out."""
    keys = sorted({key for row in rows for key in row if key.startswith(PART) and PART_NAME.fullmatch(key.removeprefix(PART))})
    return tuple(_part_curve(key) for key in keys if not key.endswith(".cut") or any(row.get(key) for row in rows))


def _part_curve(key: str) -> Curve:
    name = key.removeprefix(PART)
    cut = name.endswith(".cut")
    return Curve(
        name=f"part-{name.replace('.', '-')}",
        title=f"Reward part {name}",
        y_label="share of completions, %" if cut else "score per completion, unweighted",
        caption="Texts longer than the reward model reads: their beginning was left out."
        if cut
        else "The batch's mean before its weight: a part that rises alone, while the others fall, is being gamed.",
        signed=not cut,
        percent=cut,
        lines=(Line(key, "batch mean"),),
        smoothed=not cut,
    )

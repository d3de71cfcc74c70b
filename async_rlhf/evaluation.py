"""What an evaluation found: completions of the held-out prompts, what they are worth, and that in numbers."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from async_rlhf.intervals import Z_95, bootstrap_interval, mean_interval, sign_test, standard_error
from async_rlhf.types import FinishReason, Prompt
from async_rlhf.winrate import win_rate

Stage = Literal["start", "between", "final"]
"""Before the first update, while training goes on, after the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One answered prompt."""

    prompt: str
    completion: str
    expected: str
    """The right answer, or the reference, where the prompt has one; else empty."""
    score: float
    """By the task's own metric."""
    reward: float | None = None
    """The run's reward, where it is another function than the metric; without penalties for cut completions."""
    outcome: float | None = None
    """Against the opponent's completion: 1 better, 0.5 equal, 0 worse; None: not compared."""
    kl_nats: float | None = None
    """Sum over tokens of behavior minus reference log-probability; None for greedy completions."""
    num_tokens: int = 0
    """End-of-sequence included."""
    finish_reason: str = FinishReason.STOP
    """A FinishReason."""
    prompt_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One completion of each held-out prompt, at one temperature."""

    version: int
    """The newest version that sampled any of them."""
    temperature: float
    """0: greedy."""
    samples: tuple[Sample, ...]
    oldest_version: int = -1
    """The oldest; -1: `version` sampled all."""

    @property
    def accuracy(self) -> float:
        """Mean score; the share of right answers where the metric is 0 or 1."""
        return sum(self.scores) / len(self.samples)

    @property
    def scores(self) -> list[float]:
        """By the task's own metric."""
        return [sample.score for sample in self.samples]

    @property
    def versions(self) -> tuple[int, int]:
        """The oldest and the newest that sampled any token."""
        return (self.version if self.oldest_version < 0 else self.oldest_version), self.version


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """One evaluation: what was asked at one time."""

    stage: Stage
    version: int
    """At which it was due: no version before it sampled."""
    greedy: Evaluation
    sampled: Evaluation | None = None
    """At the training temperature, where `evaluation.sampled` asks for it."""
    opponent: str = ""
    """Whom `outcome` of the greedy samples compares with: `references`, or a model folder; empty: nobody."""
    problem: str = ""
    """Why there is no win-rate although one was asked for."""

    @property
    def versions(self) -> tuple[int, int]:
        """The oldest and the newest that sampled any token."""
        spans = [part.versions for part in (self.greedy, self.sampled) if part is not None]
        return min(oldest for oldest, _ in spans), max(newest for _, newest in spans)

    @property
    def title(self) -> str:
        """`version 40`, or `versions 40-42`."""
        oldest, newest = self.versions
        return f"version {newest}" if oldest == newest else f"versions {oldest}-{newest}"


def expected_of(prompt: Prompt) -> str:
    """The right answer, or the reference completion; empty where the prompt has neither."""
    found = prompt.columns.get("reference", prompt.columns.get("answer"))
    return "" if found is None else str(found)


def pair_up(before: Evaluation, after: Evaluation) -> Iterator[tuple[Sample, Sample]]:
    """(before, after) of each prompt in the order of `before`: several generators may answer in another order."""
    later: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in reversed(after.samples):
        later[sample.prompt, sample.expected].append(sample)
    for sample in before.samples:
        if found := later[sample.prompt, sample.expected]:
            yield sample, found.pop()


def measure(findings: Findings, start: Evaluation | None) -> dict[str, float]:
    """The numbers of an evaluation, keyed `evaluate/...` as METRICS declares them.

    Args:
        start: greedy completions before the first update, to measure the change; None: there are none, or these are they.
    """
    row = _spread("score", findings.greedy.scores) | _lengths("", findings.greedy)
    if start is not None:
        row |= _change(list(pair_up(start, findings.greedy)))
    rewards = [sample.reward for sample in findings.greedy.samples if sample.reward is not None]
    if rewards:
        row |= _spread("reward", rewards)
    outcomes = [sample.outcome for sample in findings.greedy.samples if sample.outcome is not None]
    if outcomes:
        won = win_rate(outcomes)
        row |= _named("winrate", won.share, won.interval) | {"evaluate/winrate_ties": won.ties, "evaluate/winrate_p": won.p_value}
    if findings.sampled is not None:
        row |= _spread("sampled_score", findings.sampled.scores) | _lengths("sampled_", findings.sampled)
        rewards = [sample.reward for sample in findings.sampled.samples if sample.reward is not None]
        if rewards:
            row |= _spread("sampled_reward", rewards)
        row |= _divergence(findings.sampled.samples)
    return row


def _change(pairs: Sequence[tuple[Sample, Sample]]) -> dict[str, float]:
    differences = [after.score - before.score for before, after in pairs]
    if not differences:
        return {}
    better, worse = (sum(sign * each > 0 for each in differences) for sign in (1, -1))
    named = _named("score_change", sum(differences) / len(differences), bootstrap_interval(differences))
    return named | {"evaluate/score_change_p": sign_test(better, worse)}


def _divergence(samples: Sequence[Sample]) -> dict[str, float]:
    nats = [sample.kl_nats for sample in samples if sample.kl_nats is not None]
    if not nats:
        return {}
    num_tokens = sum(sample.num_tokens for sample in samples if sample.kl_nats is not None)
    mean = sum(nats) / len(nats)
    named = {"evaluate/kl_nats": mean, "evaluate/kl_token_nats": sum(nats) / num_tokens}
    if len(nats) > 1:
        error = standard_error(nats)
        named |= {
            "evaluate/kl_error_nats": error,
            "evaluate/kl_nats_low": mean - Z_95 * error,
            "evaluate/kl_nats_high": mean + Z_95 * error,
        }
    return named


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return _named(name, sum(values) / len(values), mean_interval(values))


def _named(name: str, value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {f"evaluate/{name}": value, f"evaluate/{name}_low": interval[0], f"evaluate/{name}_high": interval[1]}


def _lengths(prefix: str, evaluation: Evaluation) -> dict[str, float]:
    num, reasons = len(evaluation.samples), Counter(sample.finish_reason for sample in evaluation.samples)
    return {
        f"evaluate/{prefix}length_tokens": sum(sample.num_tokens for sample in evaluation.samples) / num,
        f"evaluate/{prefix}stopped_share": reasons[FinishReason.STOP] / num,
        f"evaluate/{prefix}cut_share": reasons[FinishReason.LENGTH] / num,
    }


def headline(findings: Findings, row: Mapping[str, float]) -> str:
    """An evaluation in one line, for the screen."""
    noun = "accuracy" if all(score in (0, 1) for score in findings.greedy.scores) else "score"
    at = f"evaluation at version {findings.version}" if findings.stage == "between" else f"{findings.stage} {noun}"
    parts = [
        f"{at} (greedy, {len(findings.greedy.samples)} held-out problems, {findings.title}): {row['evaluate/score']:.3f}",
        f"95 % {row['evaluate/score_low']:.3f} to {row['evaluate/score_high']:.3f}",
    ]
    if "evaluate/kl_nats" in row:
        parts.append(f"KL {row['evaluate/kl_nats']:.3f} +- {row.get('evaluate/kl_error_nats', math.nan):.3f} nats")
    if "evaluate/winrate" in row:
        interval = f"{row['evaluate/winrate_low']:.3f} to {row['evaluate/winrate_high']:.3f}"
        parts.append(f"win-rate against {findings.opponent} {row['evaluate/winrate']:.3f} ({interval})")
    if findings.problem:
        parts.append(f"no win-rate: {findings.problem}")
    return ", ".join(parts)

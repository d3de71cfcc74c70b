"""The verdict: who holds a run up, and which change of its settings helps, by how much.

From the last rows of metrics.jsonl come the seconds that each stage needs for one update when it never waits:

    t_gen    a generator's engine steps, plus the pause of its install
    t_score  a scorer's calls (t_reward: a reward actor's), where they were measured
    t_learn  everything that the train loop does but wait for its batch: train_step, the push (take, export), and its books

Ideal period of one update:  P = max(t_gen, t_score, t_reward, t_learn)  where the stages overlap (max_staleness >= 1),
                             P = t_gen + t_score + t_reward + t_learn    where each waits for the others (max_staleness 0).
The stage that makes P is the bottleneck. A change divides the part of a stage that it speeds up, by n'/n for n' members instead of n,
and its gain is P / P': bounded by the next bottleneck, whatever the change. What the run loses besides (stragglers, wakings) is taken
to stay the same share, so "about". No change multiplies members by more than MAX_FACTOR: further away is `async-rlhf plan`'s business.
Where the stages need less than SATURATED_SHARE of the time T of an update, the bound on the staleness holds everybody up (or a live
source does): max_staleness eta + 1 lets (eta + 2) / (eta + 1) times as many groups be on their way, so its gain is the smaller one of
that and T / max(t_gen, t_score, t_reward, t_learn).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from async_rlhf.config import Config
from async_rlhf.stage_times import MIN_UPDATES, SETTLED_VERSION, Row, StageTimes, stage_times

MIN_GAIN = 1.1
"""A change that promises less is not worth advice."""
SATURATED_SHARE = 0.75
"""Where the stages need less than this share of the time, none of them is what holds the run up."""
PUSH_SHARE = 0.4
"""From this share of the bottleneck on, handing weights over is what holds it up, and not its work."""
READING_SHARE = 0.1
"""From this share of a generator's work on, reading anew what runs is worth a word."""
MAX_FACTOR = 4
MAX_MEMBERS = 4096
"""As many as the config takes of anything."""


class Bottleneck(StrEnum):
    """What holds the run up."""

    GENERATION = "generation"
    SCORING = "scoring"
    TRAINING = "training"
    WEIGHTS = "weights"
    """Handing new weights over: export and transfer at the learner, installs at the generators."""
    WAITING = "waiting"
    """Generators and learner wait on each other: synchronous training, or a bound on the staleness that is too tight."""
    PROMPTS = "prompts"
    """A live source brings fewer prompts than could be trained."""
    BALANCED = "balanced"
    UNKNOWN = "unknown"
    """Too few updates yet, or the rows lack what it takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One sentence for people, and what it says as values."""

    bottleneck: Bottleneck
    text: str
    gain: float = 1.0
    """Predicted factor of the samples trained per second, if the changes are made; 1: no advice."""
    changes: tuple[str, ...] = ()
    """The advice as settings, `key=value`."""
    generator_idle: float | None = None
    """Share of the time, installs counted as idle; None where unknown, as below."""
    learner_idle: float | None = None
    """Share of the time outside train_step."""
    scorer_idle: float | None = None


def verdict_of(rows: Sequence[Row], config: Config, num_cores: int | None = None) -> Verdict:
    """The verdict on the last rows of a run.

    Args:
        rows: of metrics.jsonl, in order; keys may be missing.
        config: under which they were measured.
        num_cores: of the machine, where all actors run on it and none on a GPU; None: nothing is said about cores.
    """
    times = stage_times(rows)
    if times is None:
        return Verdict(
            bottleneck=Bottleneck.UNKNOWN, text=f"too little is known yet: a verdict takes {SETTLED_VERSION + MIN_UPDATES} updates"
        )
    if times.generators is not None:  # some may have joined, or left
        config = replace(config, generator=replace(config.generator, count=times.generators))
    found = _judge(times, config, _cores_note(config, num_cores))
    return replace(
        found,
        generator_idle=times.generators_idle,
        learner_idle=times.learner_idle,
        scorer_idle=times.share(times.update_s - times.score_s) if times.score_known else None,
    )


def _judge(times: StageTimes, config: Config, cores: str) -> Verdict:
    overlapping = config.max_staleness > 0
    period_s = times.period_s(overlapping=overlapping)
    if period_s < SATURATED_SHARE * times.update_s:
        starved = any(source.live for source in config.prompts.sources.values())
        return _starved(times, config, period_s) if starved else _waiting(times, config)
    if not overlapping and _gain_of_bound(times, config) >= MIN_GAIN:
        return _waiting(times, config)
    longest_s = max(times.generation_s, times.rating_s, times.learning_s)
    pushing_s = times.push_s if longest_s == times.learning_s else times.pause_s if longest_s == times.generation_s else 0.0
    if pushing_s >= PUSH_SHARE * longest_s:
        found = _bound_by_weights(times, config)
    elif longest_s == times.generation_s:
        found = _bound_by_generation(times, config, cores)
    elif longest_s == times.learning_s:
        found = _bound_by_training(times, config, cores)
    else:
        found = _bound_by_scoring(times, config, cores)
    second_s = sorted((times.generation_s, times.rating_s, times.learning_s))[1]
    balanced = overlapping and longest_s < MIN_GAIN * second_s and found.gain < MIN_GAIN
    return _balanced(times, config) if balanced else found


def _bound_by_generation(times: StageTimes, config: Config, cores: str) -> Verdict:
    count = config.generator.count
    most = (config.max_staleness + 1) * config.batch_groups  # with more, some would never hold a ticket
    gains = {n: _gain(times, replace(times, sample_s=times.sample_s * count / n), config) for n in _multiples(count) if n <= most}
    wanted, gain = _enough(gains, count)
    epochs = config.algorithm.epochs_per_batch
    other = ""
    if times.learning_s + times.step_s / epochs <= times.generation_s:
        other = f"; or algorithm.epochs_per_batch {epochs + 1}, for which the learner has the time"
    if most * config.completions_per_prompt > 2 * count * config.generator.max_inflight:
        other += f"; or more than generator.max_inflight {config.generator.max_inflight}, if the engine has room"
    other += _reading_note(times, config)
    advice = f"{count} -> {wanted} generators would give about {gain:.1f}x{cores}"
    if wanted == count:
        advice = f"faster generators would help: each of {count} has few groups to sample, so more of them would not"
    return Verdict(
        bottleneck=Bottleneck.GENERATION,
        text=f"learner idle {_percent(times.learner_idle)}: generation-bound; {advice}{other}",
        gain=gain,
        changes=(f"generator.count={wanted}",) if wanted > count else (),
    )


def _bound_by_training(times: StageTimes, config: Config, cores: str) -> Verdict:
    ranks, shards = config.learner.num_ranks, config.batch_groups // config.algorithm.minibatches_per_batch
    fitting = [n for n in range(ranks + 1, min(MAX_FACTOR * ranks, MAX_MEMBERS) + 1) if shards % n == 0]
    wanted, gain = _enough({n: _gain(times, replace(times, step_s=times.step_s * ranks / n), config) for n in fitting}, ranks)
    changes, advice = (), list[str]()
    if wanted > ranks:
        changes = (f"learner.num_ranks={wanted}",)
        advice.append(f"{ranks} -> {wanted} learner ranks would give about {gain:.1f}x{cores}")
    epochs = config.algorithm.epochs_per_batch
    if epochs > 1:
        fewer = _gain(times, replace(times, step_s=times.step_s * (epochs - 1) / epochs), config)
        advice.append(f"algorithm.epochs_per_batch {epochs} -> {epochs - 1} about {fewer:.1f}x")
        if not changes:
            gain, changes = fewer, (f"algorithm.epochs_per_batch={epochs - 1}",)
    needed = max(1, math.ceil(config.generator.count * times.sample_s / max(times.learning_s - times.pause_s, 1e-9)))
    spare = (
        f"; {needed} of the {config.generator.count} generators would do"
        if config.max_staleness and needed < config.generator.count
        else ""
    )
    beside = ""
    if times.other_s >= PUSH_SHARE * times.learning_s:
        beside = f"; {_percent(times.share(times.other_s))} of the time is neither training nor push: checkpoints, on_update: drain, books"
    return Verdict(
        bottleneck=Bottleneck.TRAINING,
        text=(
            f"generators idle {_percent(times.generators_idle)}: training-bound; "
            f"{'; or '.join(advice) or 'a faster learner would help: batch_groups cannot be split over more ranks'}{spare}{beside}"
        ),
        gain=gain,
        changes=changes,
    )


def _bound_by_scoring(times: StageTimes, config: Config, cores: str) -> Verdict:
    pool, count = ("reward", config.reward.count) if times.reward_s > times.score_s else ("scorer", config.scorer.count)
    count = max(1, count)
    own_s, beside_s = max(times.score_s, times.reward_s), min(times.score_s, times.reward_s)
    after = {n: replace(times, score_s=own_s * count / n, reward_s=beside_s) for n in _multiples(count)}  # which is which is all one
    wanted, gain = _enough({n: _gain(times, later, config) for n, later in after.items()}, count)
    return Verdict(
        bottleneck=Bottleneck.SCORING,
        text=(
            f"learner idle {_percent(times.learner_idle)}, {pool}s at work {_percent(times.share(own_s))}: scoring-bound; "
            f"{pool}.count {count} -> {wanted} would give about {gain:.1f}x{cores}"
        ),
        gain=gain,
        changes=(f"{pool}.count={wanted}",),
    )


def _bound_by_weights(times: StageTimes, config: Config) -> Verdict:
    """Twice the batch is twice the work behind one push."""
    twice = StageTimes(
        update_s=times.update_s,
        step_s=2 * times.step_s,
        push_s=times.push_s,
        sample_s=2 * times.sample_s,
        pause_s=times.pause_s,
        score_s=2 * times.score_s,
        reward_s=2 * times.reward_s,
        other_s=times.other_s,
    )
    gain = 2 * _gain(times, twice, config)
    groups, parts = config.batch_groups, config.algorithm.minibatches_per_batch
    return Verdict(
        bottleneck=Bottleneck.WEIGHTS,
        text=(
            f"handing weights over takes {_percent(times.share(times.push_s))} of the learner's time and "
            f"{_percent(times.share(times.pause_s))} of the generators': push-bound; batch_groups {groups} -> {2 * groups} with "
            f"algorithm.minibatches_per_batch {parts} -> {2 * parts} (as many steps, half the pushes) would give about {gain:.1f}x"
            f"{_reading_note(times, config)}"
        ),
        gain=gain,
        changes=(f"batch_groups={2 * groups}", f"algorithm.minibatches_per_batch={2 * parts}"),
    )


def _starved(times: StageTimes, config: Config, period_s: float) -> Verdict:
    come, possible = (60 * config.batch_groups / max(seconds, 1e-9) for seconds in (times.update_s, period_s))
    return Verdict(
        bottleneck=Bottleneck.PROMPTS,
        text=(
            f"generators idle {_percent(times.generators_idle)}, learner idle {_percent(times.learner_idle)}: starved of prompts; "
            f"{come:,.0f} a minute are trained, about {possible:,.0f} could be: bring rows sooner, or add a source that is not live"
        ),
        gain=possible / come,
    )


def _waiting(times: StageTimes, config: Config) -> Verdict:
    bound, gain = config.max_staleness + 1, _gain_of_bound(times, config)
    unknown = "" if times.score_known or bound == 1 else ", unless the scorers are slow (they are not measured)"
    return Verdict(
        bottleneck=Bottleneck.WAITING,
        text=(
            f"generators idle {_percent(times.generators_idle)}, learner idle {_percent(times.learner_idle)}: they wait on each other; "
            f"max_staleness {bound} would give about {gain:.1f}x{unknown}"
        ),
        gain=gain,
        changes=(f"max_staleness={bound}",),
    )


def _gain_of_bound(times: StageTimes, config: Config) -> float:
    """Of max_staleness + 1: at most (eta + 2) / (eta + 1) times as many groups on their way, and no more than the longest stage allows."""
    eta = config.max_staleness
    return min((eta + 2) / (eta + 1), times.update_s / max(times.period_s(overlapping=True), 1e-9))


def _balanced(times: StageTimes, config: Config) -> Verdict:
    shares = {"generators": times.generation_s, "learner": times.learning_s} | ({"scorers": times.score_s} if times.score_known else {})
    at_work = ", ".join(f"{name} {_percent(times.share(seconds))}" for name, seconds in shares.items())
    return Verdict(
        bottleneck=Bottleneck.BALANCED,
        text=f"balanced: at work {at_work}; only more of all ({config.generator.count} and {config.learner.num_ranks} now) would give more",
    )


def _gain(before: StageTimes, after: StageTimes, config: Config) -> float:
    overlapping = config.max_staleness > 0
    return before.period_s(overlapping=overlapping) / max(after.period_s(overlapping=overlapping), 1e-9)


def _multiples(count: int) -> range:
    """Counts to try instead of `count`: few, and round ones where there are many."""
    return range(count + max(1, count // 4), min(MAX_FACTOR * count, MAX_MEMBERS) + 1, max(1, count // 4))


def _enough(gains: Mapping[int, float], count: int) -> tuple[int, float]:
    """The fewest members that give nearly as much as any number of them, and what they give; `count` and 1 where there is no choice."""
    best = max(gains.values(), default=0.0)
    return next(((members, gain) for members, gain in sorted(gains.items()) if gain * MIN_GAIN >= best), (count, 1.0))


def _cores_note(config: Config, num_cores: int | None) -> str:
    """Said beside advice to start more processes, where they would only take cores from each other."""
    if num_cores is None:
        return ""
    asked = sum(part.count * part.num_cpus for part in (config.generator, config.scorer, config.reward))
    asked += config.learner.num_ranks * config.learner.num_cpus
    return f", on more than this machine's {num_cores} cores, which are taken" if asked >= num_cores else ""


def _reading_note(times: StageTimes, config: Config) -> str:
    """Said where generators spend a good part of their time on reading anew what runs, which they need not."""
    spared = config.weights.on_update == "keep" and config.generator.engine == "vllm" and times.generation_s >= times.learning_s
    if not spared or times.canary_s < READING_SHARE * times.generation_s:
        return ""
    return f"; or weights.on_update keep_cache, as {_percent(times.share(times.canary_s))} of the time is reading anew what runs"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"

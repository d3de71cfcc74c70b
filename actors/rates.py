"""Rates and shares of one update, from what engines and meters counted before and after it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.engine_loop import EngineUsage
from actors.meters import Reading, Readings
from actors.processor_time import DRIVER, Seconds, spent

if TYPE_CHECKING:
    from actors.crew import UpdateRecord

Row = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Cumulative counts at one moment."""

    usage: Mapping[str, EngineUsage] = field(default_factory=dict[str, EngineUsage])
    """Per incarnation of a generator; the dead ones stay."""
    readings: Readings = field(default_factory=Readings)
    processor: Seconds = field(default_factory=dict[str, Mapping[str, float]])
    generator_s: float = 0.0
    """Seconds that generators took part, all of them together; see Roster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSeconds:
    """How much each kind of worker could have worked: seconds x workers that were there."""

    generators: float
    scorers: float
    rewards: float


def rates(before: Counted, after: Counted, elapsed_s: float, there: WorkerSeconds) -> Row:
    """What samplers and scorers did within `elapsed_s`. Latencies only where a call ended."""
    old, new = before.readings, after.readings

    def engines(count: str) -> float:
        return sum_of(after.usage, count) - sum_of(before.usage, count)

    row = {
        "generate/tokens_per_s": engines("num_tokens") / elapsed_s,
        "generate/groups_per_s": (new.generate.num_groups - old.generate.num_groups) / elapsed_s,
        "generate/idle_share": idle_share(before.usage, after.usage, there.generators),
        "generate/wait_ticket_share": clip((new.tickets.busy_s - old.tickets.busy_s) / max(there.generators, 1e-9)),
        "generate/running_requests": engines("running_s") / elapsed_s,
        "generate/waiting_requests": engines("waiting_s") / elapsed_s,
        "generate/kv_use_share": clip(engines("kv_use_s") / max(engines("busy_s"), 1e-9)),
        "score/groups_per_s": (new.score.num_groups - old.score.num_groups) / elapsed_s,
        "score/idle_share": _idle(old.score, new.score, there.scorers),
        **_latency("score/latency_s", old.score, new.score),
        **_step_rates(before.usage, after.usage),
    }
    if there.rewards:
        row |= {"reward/idle_share": _idle(old.reward, new.reward, there.rewards), **_latency("reward/latency_s", old.reward, new.reward)}
    return row


def weight_rates(record: "UpdateRecord") -> Row:
    """The stages of a weight push. Of the generators the slowest, each in its last install: they go on while the learner trains."""
    installs, published = record.installs.values(), record.published
    return {
        "weights/export_s": published.export_s,
        "weights/gather_s": published.gather_s,
        "weights/transfer_s": max((install.transfer_s for install in installs), default=0.0),
        "weights/install_s": max((install.install_s for install in installs), default=0.0),
        "weights/pause_s": max((install.pause_s for install in installs), default=0.0),
        "weights/canary_s": max((install.canary_s for install in installs), default=0.0),
        "weights/canary_error_nats": max((install.canary_error for install in installs), default=0.0),
    }


def processor_rates(before: Counted, after: Counted) -> Row:
    """Processor seconds since the last update; absent of what is on other nodes."""
    old, new = before.processor, after.processor
    row = {f"{part}/cpu_s": spent(old, new, part) for part in ("generate", "score", "reward", "train", "queue")}
    of_driver = [seconds for part in (DRIVER, "publish") if (seconds := spent(old, new, part)) is not None]
    row["time/driver_cpu_s"] = sum(of_driver) if of_driver else None
    return {key: seconds for key, seconds in row.items() if seconds is not None}


def train_rates(record: "UpdateRecord", elapsed_s: float) -> Row:
    """Where the learner's time went; of several ranks the slowest in each part."""
    parts = {key for report in record.reports for key in report.parts_s}
    return {
        "train/take_s": record.take_s,
        "train/step_s": record.train_s,
        **{key: max(report.parts_s.get(key, 0.0) for report in record.reports) for key in sorted(parts)},
        "train/tokens_per_s": record.reports[0].num_tokens / record.train_s,
        "train/idle_share": clip(1 - record.train_s / elapsed_s),
    }


def idle_share(before: Mapping[str, EngineUsage], after: Mapping[str, EngineUsage], engine_s: float) -> float:
    """Share of `engine_s`, seconds of all engines together, in which they did not step."""
    return clip(1 - (sum_of(after, "busy_s") - sum_of(before, "busy_s")) / max(engine_s, 1e-9))


def sum_of(usage: Mapping[str, EngineUsage], count: str) -> float:
    """One count of all engines."""
    return sum(getattr(of_one, count) for of_one in usage.values())


def clip(share: float) -> float:
    """Between 0 and 1: the clocks of several processes disagree a little."""
    return min(1.0, max(0.0, share))


def _step_rates(before: Mapping[str, EngineUsage], after: Mapping[str, EngineUsage]) -> Row:
    """What a step of an engine costs: the mean over those that took one."""
    stepped = [usage for name, usage in after.items() if usage.busy_s > (before[name].busy_s if name in before else 0.0)]
    costs = [cost for usage in stepped if (cost := usage.steps.fitted()) is not None]
    if not costs:
        return {}
    return {
        "generate/work_s": sum_of(after, "work_s") - sum_of(before, "work_s"),
        "generate/step_fixed_s": sum(cost.fixed_s for cost in costs) / len(costs),
        "generate/step_completion_s": sum(cost.completion_s for cost in costs) / len(costs),
        "generate/step_prompt_s": sum(cost.prompt_s for cost in costs) / len(costs),
    }


def _idle(before: Reading, after: Reading, worker_s: float) -> float:
    return clip(1 - (after.busy_s - before.busy_s) / max(worker_s, 1e-9))


def _latency(key: str, before: Reading, after: Reading) -> Row:
    num_calls = after.num_calls - before.num_calls
    return {key: (after.calls_s - before.calls_s) / num_calls} if num_calls else {}

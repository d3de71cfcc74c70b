"""Every metric that a run gives to Prometheus, declared once: the rows' own (metrics.py), and those that have labels or are live.

Ray puts `ray_` before each name. All have the label `run`, the name of the run folder; other labels are few and bounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from async_rlhf.metrics import FAMILIES, METRICS, PART

PREFIX = "async_rlhf_"

RAY_PREFIX = "ray_"
"""What Ray's metrics agent adds."""

MAX_LABELLED = 256
"""Generators that have gauges of their own: beyond that, only the sums and means over all of them are exported."""

DROP_REASONS = ("tied", "failed", "lost_history", "last_batch")
"""Exported from the start, at 0: a rate needs a beginning."""
REFUSAL_REASONS = ("stale_attempt", "too_old", "duplicate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """One metric in Prometheus: a gauge, or a histogram where it has boundaries."""

    meaning: str
    labels: tuple[str, ...] = ()
    """Beside `run`."""
    boundaries: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets."""


LIVE: Mapping[str, Exported] = {
    PREFIX + name: exported
    for name, exported in {
        "policy_version": Exported(meaning="completed updates"),
        "target_updates": Exported(meaning="updates that the run will make"),
        "bound_staleness_updates": Exported(meaning="max_staleness"),
        "learner_busy_share": Exported(meaning="share of the last half minute in which a batch was being trained"),
        "queue_groups": Exported(meaning="groups by where they are: leased, lost, scoring, waiting, taken, trained", labels=("place",)),
        "dropped_groups": Exported(meaning="groups that will not be trained, so far", labels=("reason",)),
        "refused_groups": Exported(meaning="scored groups that the queue turned away, so far", labels=("reason",)),
        "skipped_rows": Exported(meaning="rows of the prompts' sources that no prompt was made of, so far", labels=("reason",)),
        "restarts": Exported(meaning="starts of a part of the crew after its first, by this driver", labels=("part",)),
        "generator_idle_share": Exported(meaning="share of the last half minute without an engine step", labels=("generator",)),
        "generator_tokens_per_s": Exported(meaning="completion tokens per second of the same time", labels=("generator",)),
        "generator_running_requests": Exported(meaning="completions in the engine's batch now", labels=("generator",)),
        "generator_waiting_requests": Exported(meaning="completions without a place in it now", labels=("generator",)),
        "generator_kv_use_share": Exported(meaning="share of the key/value cache in use now", labels=("generator",)),
        "generator_policy_version": Exported(meaning="version that it installed last", labels=("generator",)),
        "generator_install_s": Exported(meaning="its last install, canary included", labels=("generator",)),
        "staleness_updates": Exported(
            meaning="staleness of every trained group's oldest token", boundaries=(0.5, 1.5, 2.5, 3.5, 4.5, 6.5, 8.5, 12.5, 16.5, 32.5)
        ),
    }.items()
}


def name_of(key: str) -> tuple[str, dict[str, str]]:
    """A row's key as Prometheus has it: the name, and labels beside `run`."""
    if key.startswith(PART):
        return PREFIX + "reward_part", {"part": key.removeprefix(PART)}
    return PREFIX + key.replace("/", "_"), {}


def row_keys() -> list[str]:
    """The keys of rows that are exported: all but an evaluation's, which are too few and far between for a time series."""
    return [key for key in METRICS if key.partition("/")[0] != "evaluate"]


EXPORTED: Mapping[str, Exported] = {
    **{name_of(key)[0]: Exported(meaning=METRICS[key].meaning) for key in row_keys()},
    PREFIX + "reward_part": Exported(meaning=FAMILIES[PART].meaning, labels=("part",)),
    **LIVE,
}
"""By the name without Ray's prefix."""

"""The way through the house in numbers: what moves along each arrow, how full the queue is, and who idles."""

from async_rlhf.dashboard.reading import Fields, count, fields, number
from async_rlhf.dashboard.settings import Settings, setting
from async_rlhf.dashboard.table import VERSION, Table

WINDOW_S = 20.0
"""Rates are means over the last so many seconds, and at least MIN_ROWS updates."""
MIN_ROWS, MAX_ROWS = 5, 500

MEANS = (
    "generate/tokens_per_s",
    "generate/idle_share",
    "generate/running_requests",
    "generate/waiting_requests",
    "generate/kv_use_share",
    "score/latency_s",
    "score/idle_share",
    "reward/idle_share",
    "train/tokens_per_s",
    "train/idle_share",
    "train/step_s",
    "queue/wait_s",
    "queue/staleness_mean",
    "weights/export_s",
    "weights/transfer_s",
    "weights/install_s",
)
"""Metrics whose means over the window the picture shows; absent where a run does not measure them."""


def flow(table: Table, settings: Settings, state: Fields) -> dict[str, object]:
    """What the picture shows; None where the run does not say.

    Returns:
        window_s and updates: what the rates are means of; updates, groups of batches, sampled and scored groups, and tickets per second;
        means: MEANS by key; queue: groups by place against its bound; counts of members; weights_version.
    """
    num_rows, window_s = _window(table)
    num_updates = max(0, num_rows - 1)
    updates_per_s = num_updates / window_s if window_s > 0 else None
    groups = setting(settings, "batch_groups", 0.0)
    queue = fields(state.get("queue"))
    staleness = setting(settings, "max_staleness", -1.0)
    bound = number((staleness + 1) * groups) if staleness >= 0 else None
    sampled_per_s, scored_per_s = (table.tail_mean(f"{stage}/groups_per_s", num_rows) for stage in ("generate", "score"))
    return {
        "window_s": window_s,
        "updates": num_updates,
        "updates_per_s": updates_per_s,
        "batch_groups_per_s": None if updates_per_s is None or not groups else updates_per_s * groups,
        "sampled_per_s": sampled_per_s,
        "scored_per_s": scored_per_s,
        "tickets_per_s": _tickets_per_s(table, sampled_per_s, num_rows, window_s),
        "means": {key: table.tail_mean(key, num_rows) for key in MEANS} if num_rows else {},
        "queue": {
            **{place: count(queue.get(place)) for place in ("leased", "scoring", "waiting", "taken", "trained")},
            "known": bool(queue),
            "bound": int(bound) if bound else None,
            "batch_groups": int(groups) or None,
        },
        "generators": round(table.tail_mean("generate/generators", 1) or setting(settings, "generator.count", 1)),
        "scorers": int(setting(settings, "scorer.count", 1)),
        "rewards": int(setting(settings, "reward.count", 0)),
        "ranks": int(setting(settings, "learner.num_ranks", 1)),
        "engine": str(settings.get("generator.engine", ""))[:40],
        "completions_per_prompt": int(setting(settings, "completions_per_prompt", 0)) or None,
        "weights_version": count(state.get("weights_version")),
    }


def _tickets_per_s(table: Table, sampled_per_s: float | None, num_rows: int, window_s: float) -> float | None:
    """What goes out is what comes back as groups, and what more is out now than at the beginning."""
    now, then = table.last("queue/leased_groups"), table.last("queue/leased_groups", back=num_rows - 1)
    if sampled_per_s is None or now is None or then is None or window_s <= 0:
        return None
    return max(0.0, sampled_per_s + (now - then) / window_s)


def _window(table: Table) -> tuple[int, float]:
    """How many of the last rows the rates are taken over, the first of them only as their beginning; and the seconds between."""
    end_s = table.last("time_s")
    if end_s is None:
        return min(len(table), MIN_ROWS), 0.0
    num = 1
    while num < min(len(table), MAX_ROWS):
        begin_s, version = table.last("time_s", back=num), table.last(VERSION, back=num)
        if begin_s is None or version is None or not 0 <= begin_s <= end_s or (end_s - begin_s > WINDOW_S and num >= MIN_ROWS):
            break
        num += 1
    begin_s = table.last("time_s", back=num - 1)
    return num, end_s - begin_s if begin_s is not None else 0.0

"""The tables of the queue's benchmark; what they compare stands in replay_queue.py."""

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import Spread, growth, in_turn, ratios, show
from queue_load import BATCH_GROUPS, PRODUCERS, PUT_GROUPS, RANKS, REST_UPDATES, WARM_UPDATES, Bench, Found, Load
from queue_stand_ins import Source, ticket_of

LATENCIES = ((PUT_GROUPS, 500), (PUT_GROUPS, 1000), (PUT_GROUPS, 2000), (16, 500))
"""Groups of a put, and groups per second; the goal is for the first: half a million tokens per second."""
WHO = ("queue", "sources", "ranks", "driver", "Ray")
"""Who spends processor time: sources stand for generators and scorers; Ray is its raylet, its head and their helpers."""
GROWN: Mapping[str, Sequence[int]] = {
    "producers": (1, 4, 16, 64),
    "ranks": (1, 2, 4),
    "batch_groups": (128, 512, 2048, 4096),
    "put_groups": (1, 4, 16, 64),
}
SLOW = {("put_groups", 1), ("put_groups", 4), ("producers", 1)}
"""Measured with a quarter of the groups."""


def limit_groups_per_s(folder: Path) -> float:
    """Pickled, unpickled and written, one process."""
    source = Source()
    _, groups = source.score([ticket_of(index, "generator-0.0") for index in range(PUT_GROUPS)])
    rounds = 100
    with (folder / "limit").open("wb", buffering=0) as file:
        started = time.perf_counter()
        for _ in range(rounds):
            packed = pickle.dumps(groups, protocol=5)
            pickle.loads(packed)
            file.write(packed)
        return rounds * PUT_GROUPS / (time.perf_counter() - started)


def parts(bench: Bench, folder: Path, *, quick: bool) -> dict[str, float]:
    """All tables; returns the metrics."""
    rounds, groups = (2, 6144) if quick else (3, 12_288)
    metrics = against_ray_and_limit(bench, folder, rounds, groups)
    metrics |= grown(bench, groups, quick=quick)
    metrics |= latencies(bench, 4096 if quick else 20_480)
    return metrics if quick else metrics | memory(bench, 106_496)


def of_groups(groups: int, **work: float) -> Load:
    """A load of about that many groups after the warm-up."""
    load = replace(Load(), **{name: value if name == "rate" else int(value) for name, value in work.items()})
    return replace(load, updates=WARM_UPDATES + max(2, groups // load.batch_groups) + REST_UPDATES)


def against_ray_and_limit(bench: Bench, folder: Path, rounds: int, groups: int) -> dict[str, float]:
    """The queue, Ray alone, and the limit."""
    load = of_groups(groups)
    found: dict[str, list[Found]] = {"queue": [], "ray": []}

    def through(how: Callable[[Load], Found], name: str) -> Callable[[], float]:
        def measure() -> float:
            found[name].append(how(load))
            return found[name][-1].groups_per_s

        return measure

    measures = {"queue": through(bench.through_queue, "queue"), "ray": through(bench.through_shelf, "ray")}
    rates = in_turn({**measures, "limit": lambda: limit_groups_per_s(folder)}, rounds)
    rows: list[Sequence[object]] = []
    for name, values in rates.items():
        cpu = [one.cpu_us for one in found.get(name, [])]
        spent = [f"{np.median([each[who] for each in cpu]):.0f}" if cpu else "" for who in WHO]
        rows.append((name, Spread.of(values), ratios(rates["queue"], values), *spent))
    columns = ("", "groups/s", "queue / this", *(f"{who}, us" for who in WHO))
    note = f"us: processor time per group, by process. {PRODUCERS} producers, {RANKS} rank, puts of {PUT_GROUPS}, B = {BATCH_GROUPS}"
    show("Through the whole cycle", columns, rows, note)
    return {
        "groups_per_s": Spread.of(rates["queue"]).median,
        "ratio_to_ray": ratios(rates["queue"], rates["ray"]).median,
        "ratio_to_limit": ratios(rates["queue"], rates["limit"]).median,
        "queue_cpu_us": float(np.median([one.cpu_us["queue"] for one in found["queue"]])),
    }


def grown(bench: Bench, groups: int, *, quick: bool) -> dict[str, float]:
    """One thing grows, the others stay; the slope is that of the queue's own processor time per group."""
    slopes: dict[str, float] = {}
    for what, sizes in GROWN.items():
        sizes = sizes[:: len(sizes) - 1] if quick else sizes
        loads = [of_groups(groups // 4 if (what, size) in SLOW else groups, **{what: size}) for size in sizes]
        found = [bench.through_queue(load) for load in loads]
        slopes[f"queue_cpu_growth_{what}"] = slope = growth(sizes, [one.cpu_us["queue"] for one in found])
        rows = [
            (size, one.groups_per_s, one.put_ms(0.5), *(f"{one.cpu_us[who]:.0f}" for who in WHO))
            for size, one in zip(sizes, found, strict=True)
        ]
        columns = (what, "groups/s", "put, ms (median)", *(f"{who}, us" for who in WHO))
        show(f"More {what}", columns, rows, f"the queue's own time per group grows with {what} to the power of {slope:.2f}")
    return slopes


def latencies(bench: Bench, groups: int) -> dict[str, float]:
    """Of a put, at given rates; beside the first, that of Ray alone."""
    rows: list[Sequence[object]] = []
    metrics: dict[str, float] = {}
    (of_goal, *_), measured = LATENCIES, [("queue", *load) for load in LATENCIES]
    for name, put_groups, rate in [*measured[:1], ("ray", *of_goal), *measured[1:]]:
        load = of_groups(groups if (put_groups, rate) == of_goal else groups // 2, rate=rate, put_groups=put_groups)
        found = bench.through_queue(load) if name == "queue" else bench.through_shelf(load)
        quantiles = (found.put_ms(share) for share in (0.5, 0.9, 0.99, 1.0))
        rows.append((name, rate, put_groups, found.groups_per_s, *quantiles, len(found.put_s)))
        if put_groups == PUT_GROUPS:
            metrics[f"put_p99_ms_at_{rate}" + ("_ray" if name == "ray" else "")] = found.put_ms(0.99)
    columns = ("", "groups/s asked", "groups of a put", "came", "median, ms", "p90", "p99", "longest", "puts")
    show("Latency of a put, from when it was due", columns, rows)
    return {"put_p99_ms": metrics[f"put_p99_ms_at_{of_goal[1]}"], **metrics}


def memory(bench: Bench, groups: int) -> dict[str, float]:
    """Of the queue's process and of the object store, while many groups go through."""
    found = bench.through_queue(of_groups(groups))
    rows = [(look.groups, look.queue_bytes / 2**20, look.store_bytes / 2**20) for look in found.memory]
    show("Memory while groups go through", ("groups", "queue's own, MiB", "object store, MiB"), rows)
    late = np.array(rows[len(rows) // 3 :])
    slopes = [float(np.polyfit(late[:, 0], late[:, column], 1)[0]) * 100_000 for column in (1, 2)]
    return {"memory_growth_mib_per_100k": slopes[0], "store_growth_mib_per_100k": slopes[1], "groups_per_s_long": found.groups_per_s}

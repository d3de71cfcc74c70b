"""Groups through the real replay queue: granted, noted as sampled, put, decided, taken by the ranks, trained, forgotten. Journal on.

    python benchmarks/replay_queue.py [--quick] [--json FILE]

The queue is the actor of a run, called as a run calls it: one driver, whose coroutines are the producers (a generator's loop each), the
groups arrive as references from processes that make them as a scorer does, each rank's shard goes as a reference into a process of its
own, every CHECKPOINT_GROUPS groups a checkpoint begins a segment and the ones before it become the rollouts dataset. Groups are K = 4
completions of 256 tokens. Nobody samples, scores or trains: what is measured is the queue and the way to and from it. With two cores
all of that shares them, so groups/s is what the queue allows beside its callers, not what it could do alone.

Against two things, in turn:
  ray    the same calls with the same groups to an actor that keeps them in a list: no rules, no journal. What Ray and the callers take.
  limit  one process that pickles and unpickles the same groups and writes their bytes to a file: what nobody can do without.
Latency is that of one put, as the driver sees it, while groups come at a given rate (not from producers that wait for each other, whose
latency is their number). Memory is the queue's own process, grown by a hundred thousand groups.
"""

import argparse
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import Goal, Spread, command_line, finish, growth, in_turn, ratios, show
from queue_load import BATCH_GROUPS, PRODUCERS, PUT_GROUPS, RANKS, REST_UPDATES, WARM_UPDATES, Bench, Found, Load, config_of
from queue_stand_ins import Source, ticket_of

from actors.launch import connect

GOALS = (
    Goal(metric="groups_per_s", at_least=3000),
    Goal(metric="put_p99_ms", at_most=20),
    Goal(metric="memory_growth_mib_per_100k", at_most=20),
)
LATENCY_RATES = (500, 1000, 2000)
"""Groups per second that are put while latency is measured; the goal is for the first: half a million tokens per second."""
LATENCY_PUT_GROUPS = 16
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


def parts(arguments: argparse.Namespace, bench: Bench, folder: Path) -> dict[str, float]:
    """All tables; returns the metrics."""
    rounds, groups, memory_groups = (2, 6144, 24_576) if arguments.quick else (3, 12_288, 106_496)
    metrics = against_ray_and_limit(bench, folder, rounds, groups)
    grown(bench, groups, quick=arguments.quick)
    metrics |= latencies(bench, seconds=4.0 if arguments.quick else 10.0)
    return metrics | memory(bench, memory_groups)


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


def grown(bench: Bench, groups: int, *, quick: bool) -> None:
    """One thing grows, the others stay; the slope is that of the queue's own processor time per group."""
    for what, sizes in GROWN.items():
        sizes = sizes[:: len(sizes) - 1] if quick else sizes
        loads = [of_groups(groups // 4 if (what, size) in SLOW else groups, **{what: size}) for size in sizes]
        found = [bench.through_queue(load) for load in loads]
        slope = growth(sizes, [one.cpu_us["queue"] for one in found])
        rows = [
            (size, one.groups_per_s, one.put_ms(0.5), *(f"{one.cpu_us[who]:.0f}" for who in WHO))
            for size, one in zip(sizes, found, strict=True)
        ]
        columns = (what, "groups/s", "put, ms (median)", *(f"{who}, us" for who in WHO))
        show(f"More {what}", columns, rows, f"the queue's own time per group grows with {what} to the power of {slope:.2f}")


def latencies(bench: Bench, seconds: float) -> dict[str, float]:
    """Of a put, at given rates."""
    rows: list[Sequence[object]] = []
    p99: dict[int, float] = {}
    for rate in LATENCY_RATES:
        found = bench.through_queue(of_groups(int(rate * seconds), rate=rate, put_groups=LATENCY_PUT_GROUPS))
        p99[rate] = found.put_ms(0.99)
        rows.append((rate, found.groups_per_s, found.put_ms(0.5), found.put_ms(0.9), p99[rate], max(found.put_s) * 1e3, len(found.put_s)))
    show(f"Latency of a put of {LATENCY_PUT_GROUPS}", ("groups/s asked", "came", "median, ms", "p90", "p99", "longest", "puts"), rows)
    return {"put_p99_ms": p99[LATENCY_RATES[0]], **{f"put_p99_ms_at_{rate}": value for rate, value in p99.items()}}


def memory(bench: Bench, groups: int) -> dict[str, float]:
    """Of the queue's process, while many groups go through."""
    found = bench.through_queue(of_groups(groups))
    seen = found.memory_bytes[len(found.memory_bytes) // 3 :]
    slope = float(np.polyfit([count for count, _ in seen], [size for _, size in seen], 1)[0])
    rows = [(count, size / 2**20) for count, size in found.memory_bytes]
    show("Memory that the queue's process has for itself", ("groups", "MiB"), rows[:: max(1, len(rows) // 8)])
    return {"memory_growth_mib_per_100k": slope * 100_000 / 2**20, "groups_per_s_long": found.groups_per_s}


def main(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was found."""
    with tempfile.TemporaryDirectory(prefix="rlhf-queue-") as name:
        folder = Path(name)
        cluster = connect(config_of(Load()), "queue", folder / "ray")
        try:
            metrics = parts(arguments, Bench(cluster, folder), folder)
        finally:
            cluster.close()
    finish(arguments, metrics, GOALS)


if __name__ == "__main__":
    main(command_line(__doc__, "fewer rounds and sizes, a quarter of the groups for memory").parse_args())

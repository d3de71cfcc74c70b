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
A put has 64 groups unless a table says otherwise. Its latency is what the driver sees while groups come at a given rate (not from producers
that wait for each other, whose latency is their number), from the moment the put was due until it is acknowledged: a producer that is late
because of its earlier calls, or because the queue had no room, counts as late. Memory is what the queue's own process has for itself, and
what Ray's object store holds, while a hundred thousand groups go through; growth is the slope over the last two thirds of them.
"""

import argparse
import tempfile
from pathlib import Path

from harness import Goal, command_line, finish

from actors.session import open_session

GOALS = (
    Goal(metric="groups_per_s", at_least=3000),
    Goal(metric="put_p99_ms", at_most=20),
    Goal(metric="memory_growth_mib_per_100k", at_most=20),
)


def main(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was found."""
    session = open_session()  # before Ray is imported
    from queue_load import Bench, Load, config_of
    from queue_tables import parts

    from actors.launch import connect

    with tempfile.TemporaryDirectory(prefix="rlhf-queue-") as folder:
        cluster = connect(config_of(Load()), "queue", session)
        try:
            metrics = parts(Bench(cluster, Path(folder)), Path(folder), quick=arguments.quick)
        finally:
            cluster.close()
    finish(arguments, metrics, GOALS)


if __name__ == "__main__":
    main(command_line(__doc__, "fewer rounds and sizes, no hundred thousand groups").parse_args())

"""A run's batches trained once more, one after the other, by the learner alone: no generator, no scorer, no queue."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass

import ray

from actors.launch import Cluster, first_failure, ready
from actors.learner_crew import LearnerCrew, LearnerParts
from actors.supervision import Supervisor
from async_rlhf.errors import ConfigError
from async_rlhf.run_plan import RunPlan
from async_rlhf.sharding import shard_batch
from async_rlhf.types import Batch, StepReport, WeightsManifest, WeightsVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrained:
    """One update, trained again."""

    update: int
    report: StepReport
    digest: int | None
    """Of the weights that it led to; None: nobody asked for it."""


async def retrain(
    plan: RunPlan, cluster: Cluster, parts: LearnerParts, batches: Iterable[Batch], asks_digest: Callable[[int], bool]
) -> AsyncGenerator[Retrained, None]:
    """Start the learner from the initial policy and train the batches, scores shaped, in order. Nobody restarts a rank that dies.

    Args:
        asks_digest: of an update; a digest costs a copy of the weights.
    Raises:
        ConfigError: the cluster is too small, or a batch does not split. LearnerLostError: a rank died. DeadlineError: it took too long.
    """
    learner, config = LearnerCrew(plan, parts, Supervisor(cluster, plan.config, 0, lambda entry: None)), plan.config
    specs = learner.next_specs()
    await cluster.reserve(specs)
    ranks = [cluster.start(spec) for spec in specs]
    waits = [ready(rank, config.timeouts.start_s, lambda name: None) for rank in ranks]
    await first_failure(learner.join(ranks, None), *waits)
    num_ranks, num_minibatches = config.learner.num_ranks, config.algorithm.minibatches_per_batch
    for batch in batches:
        if len(batch.groups) % (num_ranks * num_minibatches):
            raise ConfigError(
                f"batch {batch.update} has {len(batch.groups)} groups, which do not split into {num_minibatches} minibatches on "
                f"{num_ranks} learner ranks; leave learner.num_ranks and algorithm.minibatches_per_batch as they were, or stop before "
                f"it: --until {batch.update}"
            )
        shards = shard_batch(batch, num_ranks=num_ranks, num_minibatches=num_minibatches)
        reports = await learner.train_step(batch.update, [ray.put(shard) for shard in shards])
        digest = await _digest(learner, reports[0].version, config.timeouts.weights_s) if asks_digest(batch.update) else None
        yield Retrained(update=batch.update, report=reports[0], digest=digest)


async def _digest(learner: LearnerCrew, version: int, timeout_s: float) -> int:
    """Every rank takes part in a snapshot, rank 0 yields it."""

    def manifest_of(bucket: WeightsVersion) -> WeightsManifest:
        return bucket.manifest

    pulls = (rank.stream("snapshot", version, look=manifest_of, timeout_s=timeout_s) for rank in learner.ranks)
    buckets = (await asyncio.gather(*pulls))[0]
    return WeightsManifest.of([manifest for _, manifest in buckets]).digest

"""Weights from one GPU into an engine on another, through NCCL."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.launch import ActorSpec, Cluster
from actors.receiving import ReceivingGenerator
from actors.remote import RemoteActor
from actors.transport import ByGroup
from actors.weight_broadcaster import WeightBroadcaster
from learners.group import LearnerGroup
from learners.sending import SendingRank
from tests.support.cluster import local_cluster, make_model_folder, small_config
from tests.support.samples import make_ticket

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs, and this machine has fewer"),
    pytest.mark.timeout(600),
]

CONFIG = small_config("weights.transport=nccl", "generator.num_gpus=1", "learner.num_gpus=1", "generator.max_new_tokens=16")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_cluster() as cluster:
        yield cluster


def test_versions_sent_from_gpu_to_gpu_are_installed_and_the_canary_sings(cluster: Cluster, tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    rank = cluster.start(ActorSpec(name="learner-0.0.0", cls=SendingRank, args=(CONFIG, folder, 0), num_gpus=1, sends_weights=True))
    generator = cluster.start(
        ActorSpec(name="generator-0.0.0", cls=ReceivingGenerator, args=(CONFIG, folder, "generator-0.0.0"), num_gpus=1, max_concurrency=8)
    )

    reports, rollouts = asyncio.run(deliver_two_versions(rank, generator))

    assert [report.version for report in reports] == [0, 1]
    assert max(report.canary_error for report in reports) < 1e-2
    assert {span.version for rollout in rollouts for span in rollout.version_spans} == {1}
    assert all(np.isfinite(rollout.behavior_logprobs).all() for rollout in rollouts)


async def deliver_two_versions(rank: RemoteActor, generator: RemoteActor) -> tuple[list[Any], list[Any]]:
    await LearnerGroup([rank], CONFIG).join()
    broadcaster, transport, reports = WeightBroadcaster(300.0), ByGroup(CONFIG), []
    for version in range(2):
        await broadcaster.publish(version, [rank])
        offer = await broadcaster.newer_than(version - 1, 1.0)
        assert offer is not None
        reports.append(await transport.deliver(generator, offer, [rank]))
    return reports, await generator.call("evaluate", [make_ticket().prompt], 1.0, timeout_s=60)

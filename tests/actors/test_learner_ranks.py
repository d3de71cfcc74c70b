"""Real DeepSpeed on real ranks: the same batch gives the same update, however it is split."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from actors.launch import Cluster
from async_rlhf.config import Config
from async_rlhf.config.algorithms import AlgorithmConfig
from async_rlhf.sharding import shard_batch
from async_rlhf.types import Batch, StepReport, WeightsVersion
from tests.support.cluster import local_cluster, make_model_folder, small_config
from tests.support.ranks import Ranks, learner_worlds, make_batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ALGORITHMS = get_args(get_type_hints(AlgorithmConfig)["name"])
LOSSES = ("train/loss", "train/grad_norm", "value/loss", "value/grad_norm")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "start")


@pytest.fixture(scope="module")
def worlds(cluster: Cluster, folder: Path) -> Iterator[dict[int, Ranks]]:
    with learner_worlds(cluster, folder, (1, 2)) as worlds:
        yield worlds


def train(
    worlds: dict[int, Ranks], config: Config, num_updates: int = 2, max_logits_bytes: int = 1 << 20
) -> tuple[list[StepReport], WeightsVersion]:
    """A few updates of a fresh learner; returns rank 0's reports and the final snapshot."""
    ranks = worlds[config.learner.num_ranks]

    async def run() -> list[StepReport]:
        await ranks.all("switch", config, max_logits_bytes)
        reports: list[StepReport] = []
        for update in range(num_updates):
            shards = shard_batch(make_batch(update), num_ranks=len(ranks.actors), num_minibatches=config.algorithm.minibatches_per_batch)
            of_ranks = await ranks.group.train_step(update, shards)
            assert all(report.metrics == of_ranks[0].metrics for report in of_ranks), "metrics must be global"
            reports.append(of_ranks[0])
        return reports

    return asyncio.run(run()), ranks.weights(num_updates)


SMALL = ("learner.max_tokens_per_microbatch=60",)
TWO = ("learner.num_ranks=2",)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_and_gradient_of_one_step_are_the_same_on_two_ranks_in_small_padded_microbatches(
    worlds: dict[int, Ranks], algorithm: str
) -> None:
    """fp32, 1e-5 relative: packed on one rank against padded on two under ZeRO-2."""
    common = (f"algorithm={algorithm}", "batch_groups=8", "completions_per_prompt=4", "updates=20")

    (plain,), _ = train(worlds, small_config(*common), num_updates=1)
    (other,), _ = train(worlds, small_config(*common, *TWO, *SMALL, "learner.zero_stage=2", "learner.batching=padded"), num_updates=1)

    assert plain.num_tokens == other.num_tokens and plain.metrics.keys() == other.metrics.keys()
    assert plain.metrics["train/grad_norm"] > 1e-3
    for key in set(LOSSES) & plain.metrics.keys():
        # The PPO and GRPO loss of the first step is near 0 by construction: a sum of advantages.
        np.testing.assert_allclose(other.metrics[key], plain.metrics[key], rtol=1e-5, atol=2e-7, err_msg=key)


VARIANTS = {
    "two ranks, stage 2, small padded microbatches": (*TWO, "learner.zero_stage=2", "learner.batching=padded", *SMALL),
    "two ranks, stage 3, head in chunks": (*TWO, "learner.zero_stage=3"),
    "two ranks, stage 3, small microbatches, activations computed again": (
        *TWO,
        "learner.zero_stage=3",
        *SMALL,
        "learner.activation_checkpointing=true",
    ),
    "two ranks, stage 0": TWO,
    "one rank, stage 1, small microbatches": ("learner.zero_stage=1", *SMALL),
}


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_updates_do_not_depend_on_ranks_stages_or_microbatches(worlds: dict[int, Ranks], algorithm: str) -> None:
    """Two minibatches and two epochs, so that proximal log-probabilities and old values differ from the current ones."""
    common = (f"algorithm={algorithm}", "batch_groups=8", "updates=20", "algorithm.minibatches_per_batch=2")
    common = (*common, "algorithm.epochs_per_batch=2")
    reports, weights = train(worlds, small_config(*common))
    assert reports[-1].optimizer_steps == 8

    for variant, overrides in VARIANTS.items():
        chunk = 4 * 20 * 5 if "chunks" in variant else 1 << 20
        others, other_weights = train(worlds, small_config(*common, *overrides), max_logits_bytes=chunk)

        for plain, other in zip(reports, others, strict=True):
            for key, value in plain.metrics.items():
                np.testing.assert_allclose(other.metrics[key], value, rtol=5e-4, atol=5e-6, err_msg=f"{variant}: {key}")
        for name, tensor in weights.tensors.items():
            np.testing.assert_allclose(other_weights.tensors[name], tensor, atol=3e-5, err_msg=f"{variant}: {name}")


def test_the_critic_learns_its_returns_is_written_beside_the_policy_and_starts_again_from_there(
    worlds: dict[int, Ranks], folder: Path, tmp_path: Path
) -> None:
    common = ("algorithm=ppo", "batch_groups=8", "updates=60", "learner.warmup_steps=0", "algorithm.ppo.kl_coef=0")
    common = (*common, "learner.learning_rate=1e-6", "algorithm.ppo.critic.learning_rate=3e-3", "learner.schedule=constant")
    same = [make_batch(0)] * 30

    async def fit(config: Config, batches: list[Batch]) -> list[StepReport]:
        ranks = worlds[1]
        await ranks.all("switch", config, 1 << 20)
        return [(await ranks.group.train_step(u, shard_batch(b, num_ranks=1, num_minibatches=1)))[0] for u, b in enumerate(batches)]

    reports = asyncio.run(fit(small_config(*common), same))
    asyncio.run(worlds[1].all("save_pretrained", str(tmp_path / "model")))
    critic = tmp_path / "model-critic"
    again = asyncio.run(fit(small_config(*common, f"algorithm.ppo.critic.path={critic}"), same[:1]))

    first, last = reports[0].metrics, reports[-1].metrics
    assert first["value/mean"] == 0 and abs(first["value/explained_variance"]) < 1e-6, "a new critic knows nothing"
    assert last["value/explained_variance"] > 0.5
    assert last["value/loss"] < 0.5 * first["value/loss"]
    assert (critic / "config.json").is_file() and (critic / "tokenizer.json").is_file()
    # The 30th report's values are from before its step, the restarted ones from after it.
    assert again[0].metrics["value/explained_variance"] == pytest.approx(last["value/explained_variance"], abs=0.1)
    assert again[0].metrics["value/mean"] == pytest.approx(last["value/return_mean"], abs=0.05)


def test_ppo_trains_policy_and_critic_in_bfloat16_on_partitioned_ranks(worlds: dict[int, Ranks]) -> None:
    """bfloat16 resolves 2^-8: its metrics agree with those of fp32 to about a percent."""
    common = ("algorithm=ppo", "batch_groups=8", "updates=20", "algorithm.minibatches_per_batch=2")

    (plain, _), _ = train(worlds, small_config(*common))
    (rounded, _), _ = train(worlds, small_config(*common, *TWO, *SMALL, "learner.precision=bfloat16", "learner.zero_stage=3"))

    for key in ("train/grad_norm", "value/loss", "value/return_std", "policy/entropy_nats"):
        assert rounded.metrics[key] == pytest.approx(plain.metrics[key], rel=0.05), key


def test_known_mistake_9_bfloat16_keeps_a_full_precision_master_so_that_small_steps_add_up(worlds: dict[int, Ranks]) -> None:
    """Norm weights start at 1, where bfloat16 resolves 2^-9 = 0.00195 downwards; a step is at most 3e-4.

    Without a master copy every single step would round to nothing; with one, 20 of them move the weight.
    """
    overrides = ("algorithm=rloo", "batch_groups=8", "updates=30", "learner.warmup_steps=0", "learner.schedule=constant")
    config = small_config(*overrides, "learner.precision=bfloat16", "learner.zero_stage=1")

    _, rounded = train(worlds, config, num_updates=20)

    assert np.abs(rounded.tensors["model.norm.weight"] - 1).max() > 0.0015

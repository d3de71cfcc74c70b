"""The generator on the real vLLM, hosted by Ray: what it samples is what the installed weights say."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.generator import Generator
from actors.launch import ActorSpec, Cluster
from actors.remote import RemoteActor, kill
from async_rlhf import traffic
from async_rlhf.config.lora import LoraConfig
from async_rlhf.errors import WeightsError
from async_rlhf.policy import load_policy
from async_rlhf.snapshot import snapshot_of_folder
from async_rlhf.types import Rollout, RolloutGroup, WeightsVersion
from tests.support.adapted import adapted_policy, adapted_version
from tests.support.cluster import local_cluster, make_model_folder, small_config
from tests.support.pacing import eventually
from tests.support.samples import make_ticket
from tests.support.tiny_policy import logprobs_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TEMPERATURE = 0.7
CONFIG = small_config(f"generator.temperature={TEMPERATURE}", "generator.max_new_tokens=96", "generator.max_model_len=128")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions of one architecture: tied embeddings, where vLLM's own reload leaves the head stale."""
    root = tmp_path_factory.mktemp("models")
    return [make_model_folder(root / str(seed), seed=seed, family="qwen3", tied=True) for seed in range(2)]


@pytest.fixture(scope="module")
def generator(cluster: Cluster, folders: list[Path]) -> RemoteActor:
    spec = ActorSpec(name="generator-0.0", cls=Generator, args=(CONFIG, str(folders[0]), "generator-0.0"), max_concurrency=8)
    return cluster.start(spec)


def ask(actor: RemoteActor, method: str, *args: Any) -> Any:
    async def call() -> Any:
        return await actor.call(method, *args, timeout_s=120)

    return asyncio.run(call())


def weights_of(folder: Path, version: int) -> WeightsVersion:
    weights = snapshot_of_folder(folder, "float32")
    return replace(weights, manifest=replace(weights.manifest, version=version))


def collect(actor: RemoteActor, num_groups: int) -> list[RolloutGroup]:
    groups: list[RolloutGroup] = []
    while len(groups) < num_groups:
        groups += ask(actor, "collect", 0.0, 5.0)[1]
    return sorted(groups, key=lambda group: group.ticket.ticket_id)


def submit_and_begin(actor: RemoteActor, num_groups: int) -> None:
    """Submit groups to an idle engine, and wait until it samples some of them."""
    ask(actor, "submit", [make_ticket(index, seed=index) for index in range(num_groups)])
    eventually(lambda: ask(actor, "usage").occupancy.num_running > 0)


def policy_logprobs(folder: Path, rollout: Rollout, temperature: float, prompt: np.ndarray | None = None) -> np.ndarray:
    """[T] of the completion after the prompt, make_ticket's without one, by plain transformers."""
    prompt = make_ticket().prompt.token_ids if prompt is None else prompt
    return logprobs_of(load_policy(folder), prompt.tolist(), rollout.completion_ids.tolist(), temperature)


def check_both_sides(
    groups: list[RolloutGroup],
    *,
    versions: tuple[int, int],
    before: Callable[[Rollout], np.ndarray],
    after: Callable[[Rollout, int], np.ndarray],
) -> None:
    """Of completions that lived through an install each token carries the version that sampled it, with its log-probability.

    Args:
        before: [T] of a completion by the first version; after: [T - start] by the second, from token `start` on.
    """
    mixed = [rollout for group in groups for rollout in group.rollouts if len(rollout.version_spans) == 2]
    assert mixed, "no completion lived through the install"
    for rollout in mixed[:5]:
        old, new = rollout.version_spans
        assert (old.version, new.version, old.start, old.end, new.end) == (*versions, 0, new.start, len(rollout.completion_ids))
        np.testing.assert_allclose(rollout.behavior_logprobs[: old.end], before(rollout)[: old.end], atol=2e-4)
        np.testing.assert_allclose(rollout.behavior_logprobs[new.start :], after(rollout, new.start), atol=2e-4)


def greedy(folder: Path, num_tokens: int) -> list[int]:
    ids = make_ticket().prompt.token_ids.tolist()
    model, start = load_policy(folder), len(ids)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("which", [0, 1, 0])
def test_after_an_install_greedy_output_equals_that_of_transformers(generator: RemoteActor, folders: list[Path], which: int) -> None:
    report = ask(generator, "install", weights_of(folders[which], which))

    rollout = ask(generator, "evaluate", [make_ticket().prompt], 0.0)[0]

    assert report.canary_error < 1e-4
    assert rollout.completion_ids.tolist() == greedy(folders[which], len(rollout.completion_ids))
    assert {span.version for span in rollout.version_spans} == {which}


def test_behavior_logprobs_are_those_of_the_distribution_that_was_sampled(generator: RemoteActor, folders: list[Path]) -> None:
    ask(generator, "install", weights_of(folders[0], 2))

    ask(generator, "submit", [make_ticket(1)])
    [group] = collect(generator, 1)

    assert len(group.rollouts) == CONFIG.completions_per_prompt
    for rollout in group.rollouts:
        np.testing.assert_allclose(rollout.behavior_logprobs, policy_logprobs(folders[0], rollout, TEMPERATURE), atol=2e-4)


def test_a_seed_gives_the_same_completions_alone_and_in_a_crowd(generator: RemoteActor) -> None:
    ask(generator, "submit", [make_ticket(1, seed=7)])
    [alone] = collect(generator, 1)
    ask(generator, "submit", [make_ticket(index, seed=7 if index == 3 else index) for index in range(10)])
    crowd = collect(generator, 10)

    texts = [[rollout.completion_ids.tolist() for rollout in group.rollouts] for group in (alone, crowd[3], crowd[4])]
    assert texts[0] == texts[1] != texts[2]
    assert len({tuple(text) for text in texts[0]}) == CONFIG.completions_per_prompt


def test_a_seat_is_free_as_soon_as_its_completion_has_ended_however_long_its_siblings_go_on(generator: RemoteActor) -> None:
    ask(generator, "submit", [make_ticket(index, seed=index) for index in range(24)])
    taken: set[int] = set()
    num_groups = 0
    while num_groups < 24:
        taken.add(ask(generator, "usage").occupancy.num_running)
        num_groups += len(ask(generator, "collect", 0.0, 0.0)[1])

    assert any(running % CONFIG.completions_per_prompt for running in taken)
    seats = CONFIG.generator.max_inflight
    assert ask(generator, "submit", [], 5.0) == (seats + traffic.reserve(CONFIG)) // CONFIG.completions_per_prompt


def test_the_canary_waits_for_no_completion_even_where_others_wait_for_their_seats(generator: RemoteActor, folders: list[Path]) -> None:
    """Behind those that wait it would come when half of all have ended."""
    num_groups = 2 * CONFIG.generator.max_inflight // CONFIG.completions_per_prompt
    ask(generator, "submit", [make_ticket(index, seed=index) for index in range(num_groups)])
    ask(generator, "install", weights_of(folders[0], 3))
    meanwhile = len(ask(generator, "collect", 0.0, 0.0)[1])

    assert meanwhile < num_groups // 4
    assert len(collect(generator, num_groups - meanwhile)) == num_groups - meanwhile


def test_tokens_after_a_mid_generation_install_carry_and_follow_the_new_version(generator: RemoteActor, folders: list[Path]) -> None:
    ask(generator, "install", weights_of(folders[0], 4))
    new = weights_of(folders[1], 5)
    submit_and_begin(generator, 24)
    ask(generator, "install", new)

    check_both_sides(
        collect(generator, 24),
        versions=(4, 5),
        before=lambda rollout: policy_logprobs(folders[0], rollout, TEMPERATURE),
        after=lambda rollout, start: policy_logprobs(folders[1], rollout, TEMPERATURE)[start:],
    )


def test_more_prompt_tokens_than_one_step_takes_are_sampled_from_seeded_streams(generator: RemoteActor, folders: list[Path]) -> None:
    """250 prompts of 20 tokens: 5000, of which one forward pass takes 4096. A prompt that were read in pieces would end the engine."""
    ask(generator, "install", weights_of(folders[0], 40))
    prompts = [
        replace(make_ticket(index).prompt, token_ids=np.random.default_rng(index).integers(3, 20, 20, dtype=np.int32))
        for index in range(250)
    ]

    first, second = (ask(generator, "evaluate", prompts, TEMPERATURE) for _ in range(2))

    assert [rollout.completion_ids.tolist() for rollout in first] == [rollout.completion_ids.tolist() for rollout in second]
    assert len({tuple(rollout.completion_ids.tolist()) for rollout in first}) > 100


# What was read under earlier weights, kept.


@pytest.fixture(scope="module")
def keeper(cluster: Cluster, folders: list[Path]) -> Iterator[RemoteActor]:
    config = replace(CONFIG, weights=replace(CONFIG.weights, on_update="keep_cache"))
    actor = cluster.start(ActorSpec(name="keeper", cls=Generator, args=(config, str(folders[0]), "keeper"), max_concurrency=8))
    yield actor
    kill(actor)


def continued_logprobs(folders: list[Path], rollout: Rollout, start: int) -> np.ndarray:
    """[T - start] of the completion from token `start` on, by the second policy, with the keys and values that the first one had made
    of all that it had read: everything before the last token that it sampled.
    """
    prompt = make_ticket().prompt.token_ids
    ids = torch.from_numpy(np.concatenate([prompt, rollout.completion_ids]).astype(np.int64))[None]
    read = len(prompt) + start - 1
    with torch.no_grad():
        cache = load_policy(folders[0])(input_ids=ids[:, :read], use_cache=True).past_key_values
        logits = load_policy(folders[1])(input_ids=ids[:, read:-1], past_key_values=cache).logits[0] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, ids[0, read + 1 :, None])[:, 0].numpy()


def test_tokens_after_an_install_that_keeps_the_cache_follow_the_new_version_on_the_old_ones_keys_and_values(
    keeper: RemoteActor, folders: list[Path]
) -> None:
    ask(keeper, "install", weights_of(folders[0], 4))
    submit_and_begin(keeper, 24)
    assert ask(keeper, "install", weights_of(folders[1], 5)).canary_error < 1e-4

    check_both_sides(
        collect(keeper, 24),
        versions=(4, 5),
        before=lambda rollout: policy_logprobs(folders[0], rollout, TEMPERATURE),
        after=lambda rollout, start: continued_logprobs(folders, rollout, start),
    )


def test_the_canary_needs_no_completion_to_end_where_all_keep_their_seats(keeper: RemoteActor, folders: list[Path]) -> None:
    """All have completions of one length. A canary without a seat of its own would wait until they end: none would live through two."""
    versions = count(5)

    def all_live_through_two() -> bool:
        ask(keeper, "install", weights_of(folders[0], next(versions)))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, keeper, "evaluate", [make_ticket().prompt] * CONFIG.generator.max_inflight, 0.0)
            eventually(lambda: asked.done() or ask(keeper, "usage").occupancy.num_running > 0)
            for _ in range(2):
                ask(keeper, "install", weights_of(folders[0], next(versions)))
        return {len(rollout.version_spans) for rollout in asked.result()} == {3}

    eventually(all_live_through_two)  # they may all have ended before the second one came


def test_a_prompt_that_comes_after_an_install_is_read_by_the_new_policy_though_the_old_one_had_read_it(
    keeper: RemoteActor, folders: list[Path]
) -> None:
    """Longer than one of vLLM's blocks, so that it could be taken from what is cached. A version may come twice, with other weights."""
    prompt = replace(make_ticket().prompt, token_ids=np.random.default_rng(0).integers(3, 20, 40, dtype=np.int32))
    for which, version in ((0, 7), (1, 8), (0, 8)):
        ask(keeper, "install", weights_of(folders[which], version))
        for _ in range(2):
            [rollout] = ask(keeper, "evaluate", [prompt], TEMPERATURE)
            expected = policy_logprobs(folders[which], rollout, TEMPERATURE, prompt.token_ids)
            np.testing.assert_allclose(rollout.behavior_logprobs, expected, atol=2e-4)


# The last of the first generator.


def test_weights_that_the_canary_does_not_recognise_end_the_generator(
    cluster: Cluster, generator: RemoteActor, folders: list[Path]
) -> None:
    right, wrong = weights_of(folders[1], 6), weights_of(folders[0], 6)
    impostor = replace(wrong, manifest=replace(wrong.manifest, canary_logprobs=right.manifest.canary_logprobs))

    with pytest.raises(WeightsError, match="canary"):
        ask(generator, "install", impostor)
    with pytest.raises(Exception, match="the engine failed"):
        ask(generator, "usage")


# Adapters alone.


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_adapters_are_replaced_between_two_tokens(cluster: Cluster, tmp_path: Path, family: str) -> None:
    """Rank 3 is none of the ranks that vLLM knows by itself."""
    folder, lora = make_model_folder(tmp_path / "start", family=family), LoraConfig(rank=3, alpha=6.0, publish="adapter")
    config = dataclasses.replace(CONFIG, learner=dataclasses.replace(CONFIG.learner, lora=lora))
    spec = ActorSpec(name=f"adapted-{family}", cls=Generator, args=(config, str(folder), "adapted"), max_concurrency=8)
    actor = cluster.start(spec)
    try:
        assert ask(actor, "install", adapted_version(folder, lora, 0)).canary_error < 1e-4
        assert ask(actor, "install", adapted_version(folder, lora, 1)).canary_error < 1e-4
        new = adapted_version(folder, lora, 2)
        submit_and_begin(actor, 24)
        assert ask(actor, "install", new).canary_error < 1e-4
        groups = collect(actor, 24)
    finally:
        kill(actor)

    first, second = (
        partial(logprobs_of, adapted_policy(folder, lora, version), make_ticket().prompt.token_ids.tolist(), temperature=TEMPERATURE)
        for version in (1, 2)
    )
    check_both_sides(
        groups,
        versions=(1, 2),
        before=lambda rollout: first(rollout.completion_ids.tolist()),
        after=lambda rollout, start: second(rollout.completion_ids.tolist())[start:],
    )

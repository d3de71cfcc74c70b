"""The generator around the transformers engine: from tickets to groups, from weights to verified weights."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actors.generator
from actors.engine_transformers import TransformersEngine
from actors.generator import Generator
from async_rlhf.config import Config, load_config
from async_rlhf.errors import EngineError, WeightsError
from async_rlhf.protocols import Occupancy
from async_rlhf.types import FinishReason, Prompt, Rollout, RolloutGroup, Ticket, VersionSpan
from tests.support.pacing import Permits, eventually
from tests.support.samples import make_ticket
from tests.support.tiny_policy import logprobs_of, save_tiny_policy, tiny_policy, weights_of

pytestmark = pytest.mark.timeout(60)
WAIT_S = 30.0
EOS = 1


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), seed=0)


def make_config(*overrides: str) -> Config:
    base = ["generator.engine=transformers", "completions_per_prompt=3", "generator.max_new_tokens=10"]
    return load_config(overrides=[*base, *overrides]).config


@contextmanager
def generating(folder: Path, *overrides: str, installed: bool = True) -> Iterator[Generator]:
    generator = Generator(make_config(*overrides), str(folder), "generator-0.0")
    try:
        if installed:
            generator.install(weights_of(tiny_policy(0), 0))
        yield generator
    finally:
        generator.close()


def ticket(ticket_id: int, *, prompt: Sequence[int] = (4, 13, 5, 17), attempt: int = 0) -> Ticket:
    made = make_ticket(ticket_id, seed=1000 * ticket_id + 17, attempt=attempt)
    return replace(made, prompt=replace(made.prompt, token_ids=np.array(prompt, dtype=np.int32)))


def tickets(count: int) -> list[Ticket]:
    """Prompts of different lengths."""
    return [ticket(index, prompt=[4 + (index * 7 + k) % 18 for k in range(2 + index)]) for index in range(count)]


def sample(generator: Generator, asked: list[Ticket]) -> list[RolloutGroup]:
    generator.submit(asked)
    collected, groups = generator.collect(math.inf, WAIT_S)
    assert collected.num_inflight == 0
    return groups


def tokens_of(group: RolloutGroup) -> list[list[int]]:
    return [rollout.completion_ids.tolist() for rollout in group.rollouts]


# Sampling.


def test_each_ticket_gets_its_k_completions_in_ticket_order(folder: Path):
    asked = tickets(5)
    with generating(folder) as generator:
        generator.submit(asked[::-1])
        collected, groups = generator.collect(math.inf, WAIT_S)

    assert [group.ticket for group in groups] == asked
    assert collected.tickets == tuple(asked) and collected.num_inflight == 0
    assert all(len(group.rollouts) == 3 for group in groups)
    assert collected.usage.num_completions == 15
    assert collected.usage.num_tokens == sum(group.num_tokens for group in groups)


def test_collect_gives_nothing_when_its_time_is_up(folder: Path):
    with generating(folder) as generator:
        started = time.monotonic()
        collected, groups = generator.collect(0.0, 0.1)

    assert groups == [] and collected.tickets == ()
    assert 0.1 <= time.monotonic() - started < 5


def test_the_same_ticket_gives_the_same_completions_again(folder: Path):
    with generating(folder) as generator:
        first = sample(generator, [ticket(0)])
        again = sample(generator, [ticket(0, attempt=1)])

    assert tokens_of(first[0]) == tokens_of(again[0])
    assert again[0].ticket.attempt == 1


def test_completions_do_not_depend_on_what_else_is_sampled(folder: Path):
    asked = tickets(6)
    with generating(folder) as generator:
        together = sample(generator, asked)
        alone = [sample(generator, [one])[0] for one in asked]
    with generating(folder, "generator.max_inflight=4") as narrow:
        few_at_once = sample(narrow, asked)

    for index in range(6):
        assert tokens_of(together[index]) == tokens_of(alone[index]) == tokens_of(few_at_once[index])
        for a, b in zip(together[index].rollouts, alone[index].rollouts, strict=True):
            np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, rtol=0, atol=1e-5)


def test_siblings_and_other_seeds_differ(folder: Path):
    with generating(folder, "completions_per_prompt=8") as generator:
        groups = sample(generator, [ticket(0), ticket(1)])

    assert all(len({tuple(row) for row in tokens_of(group)}) >= 6 for group in groups)
    assert tokens_of(groups[0]) != tokens_of(groups[1])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behavior_log_probabilities_are_those_of_the_policy_at_the_sampling_temperature(temperature: float, folder: Path):
    with generating(folder, f"generator.temperature={temperature}") as generator:
        groups = sample(generator, tickets(4))

    for group in groups:
        for rollout in group.rollouts:
            expected = logprobs_of(tiny_policy(0), group.ticket.prompt.token_ids.tolist(), rollout.completion_ids.tolist(), temperature)
            np.testing.assert_allclose(rollout.behavior_logprobs, expected, rtol=0, atol=1e-4)


def test_first_tokens_are_drawn_from_the_policys_distribution(folder: Path):
    """1200 first tokens against 23 probabilities: chi-square of 22 degrees of freedom, mean 22, standard deviation 6.6."""
    prompt = [4, 13, 5, 17]
    with generating(folder, "completions_per_prompt=400", "generator.max_inflight=1200", "generator.max_new_tokens=1") as generator:
        groups = sample(generator, [ticket(index, prompt=prompt) for index in range(3)])

    with torch.no_grad():
        expected = 1200 * tiny_policy(0)(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy()
    counts = np.bincount([row[0] for group in groups for row in tokens_of(group)], minlength=len(expected))
    assert float(((counts - expected) ** 2 / expected).sum()) < 22 + 5 * 6.6


def test_a_completion_ends_with_its_first_end_token_or_at_the_limit(folder: Path):
    with generating(folder, "completions_per_prompt=8", "generator.max_new_tokens=12") as generator:
        rollouts = [rollout for group in sample(generator, tickets(8)) for rollout in group.rollouts]

    for rollout in rollouts:
        ids = rollout.completion_ids.tolist()
        stopped = rollout.finish_reason is FinishReason.STOP
        assert EOS not in ids[:-1]
        assert (ids[-1] == EOS) if stopped else (ids[-1] != EOS and len(ids) == 12)
        assert len(rollout.behavior_logprobs) == len(ids)
    reasons = {rollout.finish_reason for rollout in rollouts}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}, "the sample must show both ends"


# Weights.


def greedy(model: Any, prompt: Prompt, max_new_tokens: int) -> list[int]:
    """Hugging Face's own greedy search for one prompt."""
    ids = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
    return answer[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("seed", [0, 5])
def test_an_evaluation_is_the_greedy_search_of_the_installed_weights(seed: int, folder: Path):
    """Seed 5 gives other weights than the folder's: version 3 is really what answers."""
    prompts = [one.prompt for one in tickets(6)]
    model = tiny_policy(seed)
    with generating(folder) as generator:
        generator.install(weights_of(model, 3))
        rollouts = generator.evaluate(prompts, 0.0)

    assert [rollout.completion_ids.tolist() for rollout in rollouts] == [greedy(model, prompt, 10) for prompt in prompts]
    assert {span.version for rollout in rollouts for span in rollout.version_spans} == {3}


def test_an_evaluation_leaves_running_groups_alone(folder: Path):
    asked = tickets(3)
    with generating(folder) as generator:
        expected = [tokens_of(group) for group in sample(generator, asked)]
        generator.submit(asked)
        rollouts = generator.evaluate([one.prompt for one in tickets(4)], 0.0)
        _, groups = generator.collect(math.inf, WAIT_S)

    assert len(rollouts) == 4
    assert [tokens_of(group) for group in groups] == expected


def test_after_an_install_the_policy_of_the_new_version_samples(folder: Path):
    model = tiny_policy(7)
    with generating(folder) as generator:
        (old,) = sample(generator, [ticket(0)])
        report = generator.install(weights_of(model, 1))
        (new,) = sample(generator, [ticket(0)])

    assert (old.oldest_version, new.oldest_version, report.version) == (0, 1, 1)
    assert report.canary_error < 1e-4 and 0 < report.pause_s <= report.install_s
    for rollout in new.rollouts:
        expected = logprobs_of(model, new.ticket.prompt.token_ids.tolist(), rollout.completion_ids.tolist())
        np.testing.assert_allclose(rollout.behavior_logprobs, expected, rtol=0, atol=1e-4)
    assert tokens_of(old) != tokens_of(new)


def test_known_mistake_4_a_snapshot_is_copied_into_the_engine_and_not_shared_with_it(folder: Path):
    weights = weights_of(tiny_policy(2), 1)
    before = {name: array.copy() for name, array in weights.tensors.items()}
    with generating(folder) as generator:
        generator.install(weights)
        generator.install(weights_of(tiny_policy(3), 2))

    for name, array in before.items():
        assert np.array_equal(weights.tensors[name], array), name


class PacedEngine(TransformersEngine):
    """Steps only when the test allows it: an install can be put between two known tokens."""

    allowed: Permits

    def step(self) -> list[tuple[str, tuple[Rollout, ...]]]:
        if self.num_running:
            self.allowed.take()
        return super().step()


@contextmanager
def paced(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Iterator[tuple[Generator, Permits]]:
    config = make_config("completions_per_prompt=6", *overrides)
    allowed = Permits()

    def make_engine(_: Config, model_folder: Path) -> PacedEngine:
        engine = PacedEngine(model_folder, config, eos_token_id=EOS)
        engine.allowed = allowed
        return engine

    monkeypatch.setattr(actors.generator, "make_engine", make_engine)
    generator = Generator(config, str(folder), "generator-0.0")
    try:
        generator.install(weights_of(tiny_policy(0), 0))
        yield generator, allowed
    finally:
        allowed.release(1000)
        generator.close()


def in_thread(function: Callable[[], Any]) -> Any:
    return ThreadPoolExecutor(1).submit(function)


def waits(generator: Generator) -> bool:
    """A command waits for its turn. The one look inside: a sleep in its place would be a race."""
    return bool(generator._loop._commands)


def test_groups_are_handed_out_one_by_one_as_they_finish(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Seats for one group: they cannot end together."""
    handed_out: list[tuple[list[int], int]] = []
    with paced(folder, monkeypatch, "generator.max_inflight=6") as (generator, allowed):
        generator.submit([ticket(number) for number in range(3)])
        num_allowed = 0
        while len(handed_out) < 3:
            asks = allowed.asked > num_allowed
            collected, groups = generator.collect(0.0, 0.005)  # if another step asks: all of the one before
            handed_out += [([group.ticket.ticket_id for group in groups], collected.num_inflight)] if groups else []
            if asks:
                num_allowed += 1
                allowed.release(1)

    assert handed_out == [([0], 2), ([1], 1), ([2], 0)]


def test_keep_goes_on_under_the_new_weights_and_every_token_carries_its_version(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Four tokens of version 0, then the install, then version 1."""
    new = tiny_policy(7)
    with paced(folder, monkeypatch, "weights.on_update=keep") as (generator, allowed):
        generator.submit([ticket(0)])
        allowed.release(3)
        eventually(lambda: allowed.asked == 4)
        installing = in_thread(lambda: generator.install(weights_of(new, 1)))
        eventually(lambda: waits(generator))  # behind the fourth step
        allowed.release(1)
        installing.result(WAIT_S)
        allowed.release(100)
        _, (group,) = generator.collect(math.inf, WAIT_S)

    prompt = group.ticket.prompt.token_ids.tolist()
    crossing = 0
    for rollout in group.rollouts:
        length = len(rollout.completion_ids)
        start, end = VersionSpan(version=0, start=0, end=min(4, length)), VersionSpan(version=1, start=4, end=length)
        assert rollout.version_spans == ((start, end) if length > 4 else (start,))
        by_version = [logprobs_of(model, prompt, rollout.completion_ids.tolist()) for model in (tiny_policy(0), new)]
        expected = np.concatenate([by_version[0][:4], by_version[1][4:]])
        np.testing.assert_allclose(rollout.behavior_logprobs, expected, rtol=0, atol=1e-4)
        crossing += length > 4
    assert crossing >= 2 and group.oldest_version == 0


class Seats:
    """Stands for an engine that always has work, of which nothing ends but what the test says."""

    num_running = 1

    def __init__(self) -> None:
        self.occupancy = Occupancy(num_running=0, num_waiting=0, kv_use_share=0.0)

    def take(self, running: int, waiting: int = 0) -> None:
        self.occupancy = Occupancy(num_running=running, num_waiting=waiting, kv_use_share=0.0)

    def step(self) -> list[tuple[str, tuple[Rollout, ...]]]:
        time.sleep(0.001)
        return []

    def close(self) -> None:
        pass


def test_there_is_room_for_a_group_as_soon_as_enough_completions_have_ended_of_whichever_groups(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Twelve seats, and two groups of three wait for the next."""
    engine = Seats()
    monkeypatch.setattr(actors.generator, "make_engine", lambda *_: engine)
    with generating(folder, "generator.max_inflight=12", installed=False) as generator:
        assert generator.submit([], WAIT_S) == 6
        engine.take(10)
        assert generator.submit([], WAIT_S) == 2
        engine.take(12)
        assert generator.submit([], WAIT_S) == 2
        for running, waiting in [(12, 4), (11, 5), (12, 6), (12, 9)]:
            engine.take(running, waiting)
            assert generator.submit([], 0.02) == 0
        asking = in_thread(lambda: generator.submit([], WAIT_S))
        engine.take(11, waiting=4)

        assert asking.result(WAIT_S) == 1


def test_tickets_are_asked_for_several_at_once_when_half_of_what_waits_for_a_seat_has_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """48 seats, and eight groups of three wait for the next."""
    engine = Seats()
    monkeypatch.setattr(actors.generator, "make_engine", lambda *_: engine)
    with generating(folder, "generator.max_inflight=48", "batch_groups=32", installed=False) as generator:
        engine.take(48, waiting=13)
        assert generator.submit([], 0.02) == 0
        engine.take(48, waiting=12)
        assert generator.submit([], WAIT_S) == 4


def test_drain_finishes_what_runs_first_and_holds_later_tickets_back(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with paced(folder, monkeypatch, "weights.on_update=drain") as (generator, allowed):
        generator.submit([ticket(0)])
        allowed.release(2)
        eventually(lambda: allowed.asked == 3)
        installing = in_thread(lambda: generator.install(weights_of(tiny_policy(7), 1)))
        eventually(lambda: waits(generator))
        generator.submit([ticket(1)])
        assert not installing.done()
        allowed.release(100)
        installing.result(WAIT_S)
        _, groups = generator.collect(math.inf, WAIT_S)

    versions = [{span.version for rollout in group.rollouts for span in rollout.version_spans} for group in groups]
    assert versions == [{0}, {1}]


def test_a_finished_group_waits_for_others_and_no_longer_than_it_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with paced(folder, monkeypatch, "generator.max_inflight=6") as (generator, allowed):
        generator.submit([ticket(0), ticket(1)])
        allowed.release(11)  # at most ten tokens each: the first six completions end
        eventually(lambda: allowed.asked == 12)
        _, none = generator.collect(60.0, 0.2)
        early, groups = generator.collect(0.25, WAIT_S)
        allowed.release(100)
        _, others = generator.collect(60.0, WAIT_S)  # nobody is left to wait for

    assert none == [] and early.num_inflight == 1
    assert [[one.ticket.ticket_id for one in each] for each in (groups, others)] == [[0], [1]]


def test_all_in_flight_means_all_even_when_the_time_is_up(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A deterministic run scores whole rounds: a part of one, handed out at a deadline, would differ from run to run."""
    with paced(folder, monkeypatch, "generator.max_inflight=6") as (generator, allowed):
        generator.submit([ticket(0), ticket(1)])
        allowed.release(11)  # at most ten tokens each for the first six completions
        eventually(lambda: allowed.asked == 12)
        generator.submit([ticket(2)])
        early, none = generator.collect(math.inf, 0.2)
        allowed.release(100)
        _, groups = generator.collect(math.inf, WAIT_S)

    assert none == [] and early.tickets == ()
    assert [group.ticket.ticket_id for group in groups] == [0, 1, 2]


# What is refused.


def test_weights_of_another_model_are_refused_and_the_engine_stays_usable(folder: Path):
    weights = weights_of(tiny_policy(1), 1)
    short = replace(weights, manifest=replace(weights.manifest, tensors=weights.manifest.tensors[1:]))
    with generating(folder) as generator:
        with pytest.raises(WeightsError, match="does not fit the model: missing"):
            generator.install(short)
        (group,) = sample(generator, [ticket(0)])

    assert group.oldest_version == 0


def test_damaged_weights_are_refused_before_they_reach_the_engine(folder: Path):
    weights = weights_of(tiny_policy(1), 1)
    name = weights.manifest.tensors[0].name
    damaged = weights.tensors[name].copy()
    damaged[0, 0] += 1e-3
    with generating(folder) as generator:
        before = sample(generator, [ticket(0)])
        with pytest.raises(WeightsError, match="was damaged on its way"):
            generator.install(replace(weights, tensors={**weights.tensors, name: damaged}))
        after = sample(generator, [ticket(0)])

    assert tokens_of(before[0]) == tokens_of(after[0])


def test_a_canary_that_does_not_match_ends_the_engine(folder: Path):
    """The manifest of version 1 says what other weights would sing: checksums pass, the canary does not."""
    weights = weights_of(tiny_policy(1), 1)
    foreign = replace(weights.manifest, canary_logprobs=weights_of(tiny_policy(2), 1).manifest.canary_logprobs)
    with generating(folder) as generator:
        with pytest.raises(WeightsError, match="the engine samples from other weights"):
            generator.install(replace(weights, manifest=foreign))
        with pytest.raises(EngineError, match="samples from other weights"):
            generator.submit([ticket(0)])
        with pytest.raises(EngineError, match="samples from other weights"):
            generator.collect(0.0, 0.1)
        with pytest.raises(EngineError, match="samples from other weights"):
            generator.usage()


def test_a_wrong_canary_at_the_first_install_is_refused(folder: Path):
    weights = weights_of(tiny_policy(1), 0)
    foreign = replace(weights.manifest, canary_logprobs=weights_of(tiny_policy(2), 0).manifest.canary_logprobs)
    with (
        generating(folder, installed=False) as generator,
        pytest.raises(WeightsError, match="the engine does not compute this model"),
    ):
        generator.install(replace(weights, manifest=foreign))


def test_an_engine_that_fails_in_a_step_is_reported_to_whoever_collects(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: TransformersEngine) -> list[tuple[str, tuple[Rollout, ...]]]:
        if self.num_running:  # behind the install there may be a step of nothing
            raise MemoryError("no room")
        return []

    with generating(folder) as generator:
        monkeypatch.setattr(TransformersEngine, "step", fail)
        generator.submit([ticket(0)])
        with pytest.raises(EngineError, match=r"generator-0\.0: the engine failed: MemoryError\('no room'\)"):
            generator.collect(0.0, WAIT_S)

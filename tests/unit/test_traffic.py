"""When tickets and groups travel: by hand, and what must hold whatever the numbers."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rlhf.config import Config
from async_rlhf.config.schema import GeneratorConfig, WeightsConfig
from async_rlhf.traffic import gather_s, reserve, room


def config_of(seats: int, size: int = 4, *, batch_groups: int = 1000, count: int = 1, max_staleness: int = 1) -> Config:
    generator = GeneratorConfig(max_inflight=seats, count=count)
    return Config(completions_per_prompt=size, batch_groups=batch_groups, max_staleness=max_staleness, generator=generator)


def test_a_reserve_is_half_of_the_seats_and_two_groups_at_least():
    assert [reserve(config_of(seats)) for seats in (4, 16, 64, 256)] == [8, 8, 32, 128]


def test_no_reserve_is_held_that_other_generators_have_empty_seats_for():
    """Two generators of 64 seats; admission allows 2 B groups of 4 in all."""
    assert [reserve(config_of(64, batch_groups=groups, count=2)) for groups in (8, 16, 17, 20, 100)] == [0, 0, 4, 16, 32]


def test_an_install_that_waits_for_an_idle_engine_does_not_wait_for_a_reserve_as_well():
    assert reserve(replace(config_of(64), weights=WeightsConfig(on_update="drain"))) == 0


@pytest.mark.parametrize(
    ("num_completions", "expected"), [(0, 24), (64, 8), (79, 4), (80, 4), (81, 0), (96, 0), (106, 0)], ids=lambda value: str(value)
)
def test_tickets_are_asked_for_when_half_of_the_reserve_is_free(num_completions: int, expected: int):
    """64 seats, 32 in reserve, groups of four: nothing below 16 free places."""
    assert room(config_of(64), num_completions) == expected


@given(seats=st.integers(1, 500), size=st.integers(1, 64), groups=st.integers(1, 300), num_completions=st.integers(0, 700))
def test_what_is_asked_for_has_places_and_an_engine_with_seats_for_a_group_asks(seats: int, size: int, groups: int, num_completions: int):
    config = config_of(max(seats, size), size, batch_groups=groups)
    wanted = room(config, num_completions)

    assert wanted == 0 or num_completions + wanted * size <= config.generator.max_inflight + reserve(config)
    if num_completions + size <= config.generator.max_inflight:
        assert wanted > 0


def test_groups_gather_for_a_tenth_of_an_update_and_never_long():
    assert [gather_s(Config(), update_s) for update_s in (0.0, 0.5, 5.0, 600.0)] == [0.0, pytest.approx(0.05), pytest.approx(0.5), 1.0]


def test_several_scorers_or_reward_actors_share_what_finishes():
    config = Config()
    assert gather_s(replace(config, scorer=replace(config.scorer, count=4)), 5.0) == pytest.approx(0.125)
    assert gather_s(replace(config, reward=replace(config.reward, count=2)), 5.0) == pytest.approx(0.25)
    assert gather_s(replace(config_of(64, count=2), scorer=replace(config.scorer, count=4)), 5.0) == pytest.approx(0.25)


def test_a_deterministic_run_waits_for_all():
    assert gather_s(replace(Config(), deterministic=True), 5.0) == math.inf

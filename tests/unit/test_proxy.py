"""Reward models that a run makes itself: which parts they are, and where their folder goes."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from async_rlhf.commands.proxy import check_own_proxies, fill_in, own_proxies, with_own_proxies, without_own_proxies
from async_rlhf.config.prompts import SourceConfig
from async_rlhf.config.rewards import RewardConfig, RewardPartConfig
from async_rlhf.config.schema import Config
from async_rlhf.config.stages import RewardModelConfig
from async_rlhf.config.tasks import TaskConfig
from async_rlhf.errors import ConfigError

PARTS = {
    "length": RewardPartConfig(kind="function", function="my.py:score"),
    "given": RewardPartConfig(kind="model", path="/models/given"),
    "proxy": RewardPartConfig(kind="model", weight=2.0),
}
CONFIG = replace(Config(), reward=RewardConfig(parts=PARTS))


def test_own_proxies_are_the_model_parts_without_a_path():
    assert own_proxies(CONFIG.reward) == ["proxy"]
    assert list(without_own_proxies(CONFIG.reward).parts) == ["length", "given"]


def test_the_folder_goes_to_them_and_to_no_other_part():
    filled = fill_in(CONFIG, Path("/cache/reward-model"))

    assert filled.reward.parts["proxy"] == replace(PARTS["proxy"], path="/cache/reward-model")
    assert {name: filled.reward.parts[name] for name in ("length", "given")} == {name: PARTS[name] for name in ("length", "given")}
    assert list(filled.reward.parts) == list(PARTS), "the order of the parts is that of the settings"
    assert own_proxies(filled.reward) == []


def test_a_proxy_without_pairs_to_learn_from_is_refused_before_any_work():
    pairs = RewardModelConfig(sources={"mine": SourceConfig(path="pairs.parquet")})

    with pytest.raises(ConfigError, match=r"reward\.parts\.proxy\.path must be .* the task arithmetic has no preference pairs"):
        check_own_proxies(CONFIG)
    with pytest.raises(ConfigError, match="the task dataset has no preference pairs"):
        check_own_proxies(replace(CONFIG, task=TaskConfig(name="dataset")))
    check_own_proxies(replace(CONFIG, task=TaskConfig(name="mini_summary")))
    check_own_proxies(replace(CONFIG, reward_model=pairs))
    check_own_proxies(replace(CONFIG, reward=without_own_proxies(CONFIG.reward)))


def test_without_any_the_config_stays_as_it_is_and_nothing_is_trained():
    config = replace(CONFIG, reward=without_own_proxies(CONFIG.reward))

    assert with_own_proxies(config, Console()) is config

"""The proxy reward of a run: reward models that the settings leave to the reward-model stage."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from async_rlhf.config.rewards import RewardConfig
from async_rlhf.config.schema import Config
from async_rlhf.errors import ConfigError
from async_rlhf.tasks import PreferenceTask, load_task


def own_proxies(reward: RewardConfig) -> list[str]:
    """Names of the parts of kind `model` without a path."""
    return [name for name, part in reward.parts.items() if part.kind == "model" and not part.path]


def without_own_proxies(reward: RewardConfig) -> RewardConfig:
    """The parts that can be checked before the reward model is there."""
    return replace(reward, parts={name: part for name, part in reward.parts.items() if name not in own_proxies(reward)})


def check_own_proxies(config: Config) -> None:
    """Raise ConfigError if there is one, and nothing that it could learn from."""
    names = own_proxies(config.reward)
    if not names or config.reward_model.sources:
        return
    if config.task.name == "dataset" or not isinstance(load_task(config.task), PreferenceTask):
        raise ConfigError(
            f"reward.parts.{names[0]}.path must be a reward model's folder: the task {config.task.name} has no preference pairs from which "
            "one could be learned; set it, or reward_model.sources"
        )


def with_own_proxies(config: Config, console: Console) -> Config:
    """The same with a path for each: of the reward model that these settings make, trained if the cache does not have it.

    Raises:
        ConfigError: settings or rows cannot work. Interrupted: SIGINT or SIGTERM.
    """
    names = own_proxies(config.reward)
    if not names:
        return config
    from async_rlhf.commands.reward_model import run_reward_model

    return fill_in(config, run_reward_model(config, None, console))


def fill_in(config: Config, folder: Path) -> Config:
    """The same with `folder` as the path of each own proxy."""
    own = {name: replace(config.reward.parts[name], path=str(folder)) for name in own_proxies(config.reward)}
    return replace(config, reward=replace(config.reward, parts={**config.reward.parts, **own}))

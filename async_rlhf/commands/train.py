"""`async-rlhf train`: check everything, make a run folder, and drive."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from async_rlhf.commands.drive import drive
from async_rlhf.commands.guard import guard
from async_rlhf.commands.sft import run_sft
from async_rlhf.config import Config
from async_rlhf.config.checks import warnings_of
from async_rlhf.errors import ConfigError
from async_rlhf.model_folders import check_critic_folder, check_critic_vocabulary, check_model_folder
from async_rlhf.prompts import absolute_sources, check_prompts
from async_rlhf.recorder import make_run_folder, write_origin
from async_rlhf.rewards import absolute_rewards, check_rewards
from async_rlhf.run_lock import sole_driver
from async_rlhf.run_plan import RunPlan, reward_and_metric


def run_train(config: Config, console: Console) -> int:
    """Train; returns the process's exit code: 0, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.

    Raises:
        ConfigError: before any actor starts, and before there is a run folder.
    """
    config = absolute_sources(replace(config, reward=absolute_rewards(config.reward)))
    reward, metric = reward_and_metric(config)
    check_rewards(config.reward, reward)
    for warning in warnings_of(config):
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if config.algorithm.ppo.critic.path:
        config = _with_absolute_critic(config)
        check_critic_folder(Path(config.algorithm.ppo.critic.path))
    if config.model.path:
        model_folder = Path(config.model.path).resolve()
        check_model_folder(model_folder)
    elif config.task.name == "dataset":
        raise ConfigError("task.name dataset has no start of its own; set model.path to the folder of a model to train")
    else:
        model_folder = run_sft(config, None, console)
    check_prompts(config, model_folder)
    if config.algorithm.ppo.critic.path:
        check_critic_vocabulary(Path(config.algorithm.ppo.critic.path), model_folder)
    folder = make_run_folder(config)
    console.print(f"run folder: {folder}", markup=False, highlight=False, soft_wrap=True)
    plan = RunPlan(config=config, run_folder=folder, model_folder=model_folder, reward=reward, metric=metric)
    write_origin(plan)
    if config.supervision.driver_restarts:
        return guard(folder, config.supervision, console)
    with sole_driver(folder):
        return drive(plan, console)


def _with_absolute_critic(config: Config) -> Config:
    """The same path for actors in another folder."""
    ppo = config.algorithm.ppo
    critic = replace(ppo.critic, path=str(Path(ppo.critic.path).resolve()))
    return replace(config, algorithm=replace(config.algorithm, ppo=replace(ppo, critic=critic)))

"""`async-rlhf train`: check everything, make a run folder, and drive."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from async_rlhf.commands.drive import drive
from async_rlhf.commands.guard import guard
from async_rlhf.commands.proxy import check_own_proxies, with_own_proxies, without_own_proxies
from async_rlhf.commands.resume import run_resume
from async_rlhf.commands.say import say
from async_rlhf.commands.sft import run_sft
from async_rlhf.config import Config
from async_rlhf.config.checks import warnings_of
from async_rlhf.errors import ConfigError
from async_rlhf.hub import with_local_models
from async_rlhf.model_folders import check_critic_folder, check_critic_vocabulary, check_model_folder
from async_rlhf.opponents import check_opponent, with_absolute_paths
from async_rlhf.prompts import absolute_sources, check_prompts, held_out_prompts
from async_rlhf.recorder import make_run_folder, write_origin
from async_rlhf.rewards import absolute_rewards, check_rewards
from async_rlhf.run_lock import sole_driver
from async_rlhf.run_plan import RunPlan, reward_and_metric
from async_rlhf.wandb_sink import check_wandb


def run_or_resume(config: Config, console: Console) -> int:
    """Train, or go on with the run in `run.dir`, by its own settings: a job that is started again by a scheduler has one command line.

    Raises:
        ConfigError: as `run_train` and `run_resume` say, and without a `run.dir`.
    """
    if not config.run.dir:
        raise ConfigError("--resume needs the folder of the run that it may find; give run.dir=FOLDER")
    folder = Path(config.run.dir).resolve()
    if not (folder / "config.yaml").is_file():
        return run_train(config, console)
    say(console, f"{folder} holds a run: going on with it, by its own settings (others: async-rlhf resume {folder} key=value)")
    if config.supervision.driver_restarts:
        return guard(folder, config.supervision, console)
    return run_resume(folder, [], None, console)


def run_train(config: Config, console: Console) -> int:
    """Train; returns the process's exit code: 0, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.

    Raises:
        ConfigError: before any actor starts, and before there is a run folder.
    """
    config = with_local_models(config)
    config = absolute_sources(replace(config, reward=absolute_rewards(config.reward)))
    reward, metric = reward_and_metric(config)
    check_rewards(without_own_proxies(config.reward), reward)
    check_own_proxies(config)
    check_wandb(config)
    for warning in warnings_of(config):
        say(console, f"warning: {warning}", style="yellow")
    if config.algorithm.ppo.critic.path:
        check_critic_folder(Path(config.algorithm.ppo.critic.path))
    if config.model.path:
        model_folder = Path(config.model.path)
        check_model_folder(model_folder)
    elif config.task.name == "dataset":
        raise ConfigError("task.name dataset has no start of its own; set model.path to the folder of a model to train")
    else:
        model_folder = run_sft(config, None, console)
    check_prompts(config, model_folder)
    config = with_own_proxies(config, console)
    if config.algorithm.ppo.critic.path:
        check_critic_vocabulary(Path(config.algorithm.ppo.critic.path), model_folder)
    config = with_absolute_paths(config)
    check_opponent(config.evaluation, held_out_prompts(config, model_folder))
    folder = make_run_folder(config)
    say(console, f"run folder: {folder}")
    plan = RunPlan(config=config, run_folder=folder, model_folder=model_folder, reward=reward, metric=metric)
    write_origin(plan)
    if config.supervision.driver_restarts:
        return guard(folder, config.supervision, console)
    with sole_driver(folder):
        return drive(plan, console)

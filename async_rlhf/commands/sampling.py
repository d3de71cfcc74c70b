"""A finished policy, answering in this very process: what `eval` and `generate` share."""

import os
import time
import warnings
from collections.abc import Generator as Contents
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from async_rlhf.config import Config, load_config
from async_rlhf.config.load import split_arguments
from async_rlhf.config.lora import LoraConfig
from async_rlhf.errors import ConfigError
from async_rlhf.hub import model_folder
from async_rlhf.model_folders import check_model_folder
from async_rlhf.state import STATE_FILE, read_state
from async_rlhf.types import Prompt, Rollout

if TYPE_CHECKING:
    from actors.generator import Generator

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "DS_LOG_LEVEL": "error"}
"""Of libraries that talk about themselves."""
LOOK_S = 0.2
"""Seconds between two looks at how far the sampling is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedPolicy:
    """A model folder with all its weights, and the settings to sample from it with."""

    folder: Path
    config: Config
    of_run: bool
    """Whether a run folder was given."""


def policy_of(model: Path, words: list[str]) -> FinishedPolicy:
    """
    Args:
        model: a Hugging Face folder, or a run folder: then its final policy, under its own config.
        words: config files and overrides, as for `train`.
    Raises:
        ConfigError: no model there, a run that is not finished, or a wrong setting.
    """
    files, overrides = split_arguments(words)
    of_run = (model / STATE_FILE).is_file()
    if of_run and (read_state(model).phase != "finished" or not (model / "model").is_dir()):
        raise ConfigError(
            f"{model} is the folder of a run that is not finished, so it has no final policy; make a model folder of its newest checkpoint "
            f"with `async-rlhf export {model}`, and give that"
        )
    config = load_config([model / "config.yaml", *files] if of_run else files, overrides).config
    config = replace(config, learner=replace(config.learner, lora=LoraConfig()))  # the folder has all weights
    folder = (model / "model").resolve() if of_run else model_folder("MODEL", str(model))
    if not folder.is_dir():
        raise ConfigError(f"{model} is no folder; give a Hugging Face model folder, a hub id, or the folder of a finished run")
    check_model_folder(folder)
    return FinishedPolicy(folder=folder, config=config, of_run=of_run)


def prepare_process() -> None:
    """Make libraries fast and silent; before the engine is imported, which reads the environment then."""
    from actors.environment import ACTOR_ENVIRONMENT

    for name, value in (ACTOR_ENVIRONMENT | QUIET).items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


@contextmanager
def engine_of(config: Config, folder: Path) -> "Contents[Generator]":
    """A generator that samples from the folder's weights, verified by a canary; closed at the end."""
    from actors.generator import Generator
    from async_rlhf.snapshot import snapshot_of_folder

    # Before the engine: vLLM changes transformers' own classes for some architectures.
    weights = snapshot_of_folder(folder, config.generator.dtype)
    generator = Generator(config, str(folder), "here")
    try:
        generator.install(weights)
        yield generator
    finally:
        generator.close()


def sample(generator: "Generator", prompts: Sequence[Prompt], temperature: float, console: Console) -> list[Rollout]:
    """One completion of each prompt, all at once; a bar in a terminal shows how many are there."""
    before = generator.usage().num_completions
    with ThreadPoolExecutor(1) as pool, Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("greedy" if not temperature else f"temperature {temperature:g}", total=len(prompts))
        sampling = pool.submit(generator.evaluate, prompts, temperature)
        try:
            while not sampling.done():
                progress.update(bar, completed=generator.usage().num_completions - before)
                time.sleep(LOOK_S)
        except BaseException:  # Ctrl-C above all: the pool would wait for the last completion
            generator.close()
            raise
        return sampling.result()

"""`async-rlhf resume`: take a run up where its newest whole checkpoint and its journal left it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from async_rlhf.checkpoints import Checkpoint, newest
from async_rlhf.commands.drive import drive
from async_rlhf.commands.say import say
from async_rlhf.config import Config, load_config, to_yaml
from async_rlhf.config.fields import named_section
from async_rlhf.config.load import split_arguments
from async_rlhf.errors import ConfigError
from async_rlhf.hub import with_local_models
from async_rlhf.journal import check_mark, read_frames
from async_rlhf.model_folders import check_model_folder
from async_rlhf.opponents import check_opponent, with_absolute_paths
from async_rlhf.prompts import absolute_sources, check_prompts, held_out_prompts
from async_rlhf.recorder import HIDDEN, keep_config, without_secrets
from async_rlhf.rewards import absolute_reward, absolute_rewards, check_rewards
from async_rlhf.run_lock import sole_driver
from async_rlhf.run_plan import RunPlan
from async_rlhf.scaling import forget_wishes, scaled_count
from async_rlhf.state import read_state, write_atomically
from async_rlhf.wandb_sink import check_wandb

FIXED = ("batch_groups", "max_staleness", "task", "seed", "prompts.held_out")
"""The arithmetic of slots, or the order of prompts, depends on these."""

FIXED_OF_SOURCES = ("path", "subset", "split", "streaming", "live")
"""Of a source that was drawn from: its position counts these very rows. Others may join it, and it may leave."""

HARMLESS = ("num_ranks", "zero_stage", "batching", "max_tokens_per_microbatch", "lora.publish", "num_cpus", "num_gpus", "peak_tflops")
"""Of `learner`: an update comes out the same, up to rounding."""


def run_resume(folder: Path, words: Sequence[str], version: int | None, console: Console) -> int:
    """Resume; returns the exit code, as `train` does.

    Args:
        words: config files and overrides, applied to the run's own config.
        version: of the checkpoint to go on from; None: the newest whole one.
    Raises:
        ConfigError: no such run or checkpoint, a living one, or a change that it cannot survive. JournalError: the journal is damaged.
    """
    folder = folder.resolve()
    before, config = resumed_configs(folder, words)
    with sole_driver(folder):
        return _resume(folder, before, config, version, console)


def _resume(folder: Path, before: Config, config: Config, version: int | None, console: Console) -> int:
    state = read_state(folder) if (folder / "state.json").is_file() else None
    changed = _changes(before, config)
    fixed = [change for change in changed if _is_fixed(change.split(" ")[0])]
    if bool(before.evaluation.sources) != bool(config.evaluation.sources) and before.prompts.sources:
        fixed.append("evaluation.sources (whether there are any decides which rows of prompts.sources are trained)")
    if fixed:
        raise ConfigError(f"resume cannot change {', '.join(fixed)}; start a new run for that (model.path={folder / 'model'})")
    checkpoint, skipped = newest(folder, version)
    say(console, *(f"skipped: {problem}" for problem in skipped))
    if state is not None and state.phase == "finished" and state.version >= config.updates:
        say(console, f"{folder} is finished: all {state.version} updates are trained; for more: async-rlhf resume {folder} updates=N")
        return 0
    check_journal(folder, checkpoint)
    origin = read_origin(folder)
    # Paths of the saved config may be relative to where the run was started; those of origin.json never are.
    keys = {change.split(" ")[0] for change in changed}
    config = with_local_models(config)
    model_folder = Path(config.model.path) if "model.path" in keys else Path(origin["model_folder"])
    check_model_folder(model_folder)
    reward = origin["reward"]
    if "reward.function" in keys:
        reward = absolute_reward(config.reward.function) or origin["metric"]
    config = dataclasses.replace(config, reward=absolute_rewards(config.reward))
    check_rewards(config.reward, reward)
    check_wandb(config)
    config = with_absolute_paths(absolute_sources(config))
    check_prompts(config, model_folder)
    check_opponent(config.evaluation, held_out_prompts(config, model_folder))
    undo = any(_changes_training(change) for change in changed)
    at = f"checkpoint {checkpoint.folder}" if checkpoint else "version 0: there is no checkpoint"
    say(console, f"run folder: {folder}", *([f"going on from {at}"] if state else []), *(f"changed: {change}" for change in changed))
    if undo:
        say(console, "these settings shape the updates: batches after the checkpoint are decided and trained anew")
    session = state.session + 1 if state is not None else 0
    if changed:
        keep_config(folder, session)
    write_atomically(folder / "config.yaml", to_yaml(without_secrets(config)))
    settle_wishes(folder, config.generator.count, console)
    plan = RunPlan(
        config=config,
        run_folder=folder,
        model_folder=model_folder,
        reward=reward,
        metric=origin["metric"],
        session=session,
        checkpoint=checkpoint,
        undo=undo,
        evaluate_start=not (folder / "samples.json").is_file(),
    )
    return drive(plan, console)


def settle_wishes(folder: Path, count: int, console: Console) -> None:
    """Forget the wishes of before unless `count` is what they led to: they would overrule what was asked for just now."""
    try:
        settled = scaled_count(folder) == count
    except ConfigError as error:  # a restart by the guard, or by the cluster, has nobody who could mend the file
        settled = False
        say(console, f"warning: {error}; going on without it, with generator.count={count}")
    if not settled:
        forget_wishes(folder)


def check_journal(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Raise JournalError unless the journal holds the history that the checkpoint belongs to, ConfigError if there is no way on."""
    journal = folder / "journal"
    if checkpoint is not None:
        check_mark(journal, checkpoint.mark)
        return
    first = next(read_frames(journal), None) if journal.is_dir() else None
    if first is not None and (decided := json.loads(first.payload)["ledger"]["decided"]) > 0:
        raise ConfigError(
            f"{folder} has no whole checkpoint, and its journal begins at update {decided}: restore a checkpoint, or start a new run"
        )


def read_origin(folder: Path) -> dict[str, str]:
    """What the run began from; see recorder.write_origin.

    Raises:
        ConfigError: the folder does not say.
    """
    try:
        return json.loads((folder / "origin.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is no folder of a run: origin.json cannot be read ({error})") from None


def resumed_configs(folder: Path, words: Sequence[str]) -> tuple[Config, Config]:
    """The run's config as it was, and as it shall be: with the number of generators that it was scaled to, unless the words name one.

    Raises:
        ConfigError: no run, or words that cannot be.
    """
    files, overrides = split_arguments(list(words))
    own = folder / "config.yaml"
    if not own.is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.yaml; give the folder that `train` printed")
    before, config = load_config([own]).config, load_config([own, *files], overrides).config
    asked = config.generator.count != before.generator.count or any(word.startswith("generator.count=") for word in overrides)
    with suppress(ConfigError):  # settle_wishes warns of files that hold nonsense
        if not asked and (count := scaled_count(folder)):
            config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, count=count))
    hidden = [name for name, value in config.env.items() if value == HIDDEN]
    if hidden:
        raise ConfigError(
            f"the saved config hides env.{hidden[0]}, a secret: give it again (env.{hidden[0]}=...), or better by the environment"
        )
    return before, config


def _changes(before: Any, after: Any, prefix: str = "") -> list[str]:
    changes: list[str] = []
    for item in dataclasses.fields(before):
        old, new = getattr(before, item.name), getattr(after, item.name)
        if dataclasses.is_dataclass(old):
            changes += _changes(old, new, f"{prefix}{item.name}.")
        elif named_section(item.type):
            changes += _changes_of_named(old, new, f"{prefix}{item.name}.")
        elif old != new:
            changes.append(f"{prefix}{item.name} {old} -> {new}")
    return changes


def _changes_of_named(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> list[str]:
    """Of sections that the user names: those that both have, and those that came or went."""
    changes = [change for name in before if name in after for change in _changes(before[name], after[name], f"{prefix}{name}.")]
    changes += [f"{prefix}{name} -> left out" for name in before if name not in after]
    return changes + [f"{prefix}{name} added" for name in after if name not in before]


def _is_fixed(key: str) -> bool:
    section, _, rest = key.partition(".sources.")
    return key in FIXED or key.split(".")[0] in FIXED or (section == "prompts" and rest.partition(".")[2] in FIXED_OF_SOURCES)


def _changes_training(change: str) -> bool:
    """Whether batches trained again under this change would lead to other weights."""
    section, _, key = change.split(" ")[0].partition(".")
    if section == "learner":
        return key not in HARMLESS
    return section in ("algorithm", "updates") or change.startswith(("reward.normalize", "reward.missing_eos_percentile"))

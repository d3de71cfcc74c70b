"""`async-rlhf replay`: train the batches of a run once more, from its journal and its rollouts dataset, without generators.

On the CPU in fp32, with the run's own settings, every number comes out the same, bit for bit: where one does not, there the run
and this machine, or this code, went different ways. Reads JSON, YAML, Arrow, Parquet and safetensors, and takes neither import
paths nor environment variables from the run folder: that of a stranger is safe to replay.
"""

import asyncio
import os
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from async_rlhf.commands.resume import read_origin
from async_rlhf.commands.say import say
from async_rlhf.commands.signals import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_TERMINATED, end_of, on_ray, until_signal
from async_rlhf.comparison import Comparison
from async_rlhf.config import load_config
from async_rlhf.config.load import split_arguments
from async_rlhf.errors import ConfigError
from async_rlhf.model_folders import check_critic_folder, check_critic_vocabulary, check_model_folder
from async_rlhf.recorder import read_rows
from async_rlhf.replayed import Extent, batches, shaped, survey
from async_rlhf.run_plan import RunPlan
from async_rlhf.state import read_state

if TYPE_CHECKING:
    from actors.launch import Cluster
    from actors.replay_run import Retrained


@dataclass(kw_only=True)
class _Replay:
    """What is to be trained again, and what came of it."""

    plan: RunPlan
    extent: Extent
    count: int
    """Updates."""
    comparison: Comparison | None
    console: Console
    digest: int | None = field(default=None)
    """Of the last weights."""

    def asks_digest(self, update: int) -> bool:
        """Whether the weights after this update have to be looked at."""
        compared = self.comparison is not None and update in self.extent.digests
        return compared or update == self.count - 1

    def book(self, done: "Retrained") -> None:
        """An update is through."""
        metrics = done.report.metrics
        text = f"update {done.update + 1}/{self.count} loss {metrics['train/loss']:.6g} grad norm {metrics['train/grad_norm']:.6g}"
        if self.comparison is not None:
            text += f" {self.comparison.add(done.update, metrics, done.digest)}"
        self.digest = done.digest
        say(self.console, text)


def run_replay(folder: Path, words: Sequence[str], until: int | None, compare: bool, console: Console) -> int:
    """Replay; returns the exit code: 0 well, 1 with `compare` something differs, 130 Ctrl-C, 143 SIGTERM.

    Args:
        words: overrides, applied to the run's own config.
        until: stop after so many updates; None: all that there are.
        compare: with the metrics and the digests that the run left.
    Raises:
        ConfigError: no run, no batches, not so many, no model, or nothing to compare with. JournalError: a batch is missing or damaged.
        RunError: a learner rank failed.
    """
    folder = folder.resolve()
    plan = _plan(folder, words, console)
    extent = survey(folder)
    if until is not None and not 1 <= until <= extent.num_updates:
        raise ConfigError(f"--until must be 1 to {extent.num_updates}, the updates that {folder} has batches for, got {until}")
    count = until or extent.num_updates
    comparison = _comparison(folder, extent, count) if compare else None
    sources = ((extent.first_in_journal, "the rollouts dataset"), (extent.num_updates - extent.first_in_journal, "the journal"))
    found = " and ".join(f"{number} in {where}" for number, where in sources if number)
    say(console, f"run folder: {folder}", f"batches: {extent.num_updates} ({found}), to be trained again: {count}")
    replay = _Replay(plan=plan, extent=extent, count=count, comparison=comparison, console=console)
    code = _execute(replay)
    if code != EXIT_OK:
        return code
    say(console, f"{count} updates trained again; digest of the weights after them: {replay.digest}")
    if comparison is None:
        return EXIT_OK
    say(console, *comparison.verdict())
    if not comparison.differences:
        return EXIT_OK
    if words:
        say(console, f"under other settings than the run's: {' '.join(words)}")
    if count := _resumes(folder):
        say(console, f"the run was resumed {count} times: a setting that this changed holds for all updates of a replay")
    return EXIT_FAILED


def _plan(folder: Path, words: Sequence[str], console: Console) -> RunPlan:
    files, overrides = split_arguments(list(words))
    if files:
        raise ConfigError(f"replay takes overrides alone, which look like key=value, got {files[0]!r}")
    own = folder / "config.yaml"
    if not own.is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.yaml; give the folder that `train` printed")
    config = load_config([own], overrides).config
    given = load_config(overrides=[word for word in overrides if word.startswith("env.")]).config.env
    if left_out := sorted(config.env.keys() - given.keys()):
        say(console, f"environment variables of the run are not taken over: {', '.join(left_out)}; give env.NAME=VALUE where one matters")
    config = replace(config, env=given)
    origin = read_origin(folder)
    elsewhere = any(word.partition("=")[0].strip() == "model.path" for word in overrides)
    model_folder = Path(config.model.path if elsewhere else origin["model_folder"]).resolve()
    check_model_folder(model_folder)
    if critic := config.algorithm.ppo.critic.path:
        check_critic_folder(Path(critic))
        check_critic_vocabulary(Path(critic), model_folder)
    return RunPlan(config=config, run_folder=folder, model_folder=model_folder, reward=origin["reward"], metric=origin["metric"])


def _resumes(folder: Path) -> int:
    return read_state(folder).session if (folder / "state.json").is_file() else 0


def _comparison(folder: Path, extent: Extent, count: int) -> Comparison:
    try:
        rows = {int(row["update"]): row for row in read_rows(folder)}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'metrics.jsonl'} is damaged: {error}; replay without --compare") from None
    if 0 not in rows:
        raise ConfigError(f"{folder} has no metrics.jsonl with update 0: nothing to compare with; replay without --compare")
    return Comparison(rows=rows, digests=extent.digests, num_updates=count)


def _execute(replay: _Replay) -> int:
    """Train on Ray; returns the exit code."""
    plan = replay.plan
    try:
        # Under a name of its own: the run itself may be going on in the same cluster.
        with on_ray(plan.config, f"replay_{os.getpid()}_{plan.run_id}", lambda line: None) as cluster:
            asyncio.run(until_signal(_train(replay, cluster)))
        return EXIT_OK
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        code, text = end_of(error)
        if code not in (EXIT_INTERRUPTED, EXIT_TERMINATED):
            raise
        say(replay.console, text)
        return code


async def _train(replay: _Replay, cluster: "Cluster") -> None:
    from actors.learner_crew import LearnerParts
    from actors.replay_run import retrain
    from learners.group import LearnerGroup
    from learners.rank import LearnerRank

    plan = replay.plan
    parts = LearnerParts(rank_class=LearnerRank, make_group=LearnerGroup)
    again = shaped(islice(batches(plan.run_folder), replay.count), plan.config.reward)
    async with aclosing(retrain(plan, cluster, parts, again, replay.asks_digest)) as updates:
        async for done in updates:
            replay.book(done)

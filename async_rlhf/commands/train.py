"""`async-rlhf train`: check everything, run, and leave a complete run folder behind, however the run ends."""

import asyncio
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from async_rlhf.commands.sft import run_sft
from async_rlhf.config import Config
from async_rlhf.config.checks import warnings_of
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.model_folders import check_critic_folder, check_critic_vocabulary, check_model_folder
from async_rlhf.progress import Progress
from async_rlhf.recorder import Recorder, make_run_folder, write_samples, write_summary
from async_rlhf.report import write_report
from async_rlhf.rewards import absolute_reward, load_reward
from async_rlhf.run_plan import RunPlan
from async_rlhf.state import TrainingState, write_atomically
from async_rlhf.tasks import load_task

if TYPE_CHECKING:
    from actors.accounts import Accounts
    from actors.launch import Cluster
    from actors.run import Outcome

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143
EXITS = {EXIT_OK: "success", EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "terminated"}
"""`exit` in summary.json; any other code: failed."""
PHASES = {EXIT_OK: "finished", EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "interrupted"}
"""`phase` in state.json, likewise."""


def run_train(config: Config, console: Console) -> int:
    """Train; returns the process's exit code: 0, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.

    Raises:
        ConfigError: before any actor starts, and before there is a run folder.
    """
    metric = load_task(config.task).reward
    reward = absolute_reward(config.reward.function) if config.reward.function else metric
    load_reward(reward)
    for warning in warnings_of(config):
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if config.algorithm.ppo.critic.path:
        config = _with_absolute_critic(config)
        check_critic_folder(Path(config.algorithm.ppo.critic.path))
    if config.model.path:
        model_folder = Path(config.model.path).resolve()
        check_model_folder(model_folder)
    else:
        model_folder = run_sft(config, None, console)
    if config.algorithm.ppo.critic.path:
        check_critic_vocabulary(Path(config.algorithm.ppo.critic.path), model_folder)
    folder = make_run_folder(config)
    console.print(f"run folder: {folder}", markup=False, highlight=False, soft_wrap=True)
    with Progress(console, config.updates) as progress, closing(Recorder(folder)) as recorder:
        plan = RunPlan(config=config, run_folder=folder, model_folder=model_folder, reward=reward, metric=metric)
        code, summary = _execute(plan, _Watcher(progress, recorder))
    write_summary(folder, summary)
    write_report(folder)
    _say_goodbye(console, folder, summary)
    return code


def _with_absolute_critic(config: Config) -> Config:
    """The same path for actors in another folder."""
    ppo = config.algorithm.ppo
    critic = replace(ppo.critic, path=str(Path(ppo.critic.path).resolve()))
    return replace(config, algorithm=replace(config.algorithm, ppo=replace(ppo, critic=critic)))


class _Watcher:
    """Passes what happens on to the screen and to the run folder."""

    def __init__(self, progress: Progress, recorder: Recorder) -> None:
        self._progress = progress
        self.recorder = recorder

    def stage(self, text: str) -> None:
        self._progress.stage(text)

    def update(self, row: Mapping[str, float], state: TrainingState) -> None:
        self.recorder.write(row)
        self._progress.update(row, state)


def _execute(plan: RunPlan, watcher: _Watcher) -> tuple[int, dict[str, object]]:
    """Run on Ray; returns the exit code and the summary, whatever happens."""
    from actors.accounts import Accounts
    from actors.session import open_session

    started_s, folder = time.perf_counter(), plan.run_folder
    accounts = Accounts(config=plan.config, run_id=plan.run_id)
    write_atomically(folder / "state.json", accounts.state("starting").to_json())
    session, cluster, outcome, end = None, None, None, (EXIT_OK, "")
    signal.signal(signal.SIGTERM, _raise_interrupted)
    try:
        session = open_session()
        watcher.stage(f"joining Ray at {os.environ['RAY_ADDRESS']}" if session is None else "starting Ray")
        cluster = _connect(plan, session)
        outcome = _run(plan, cluster, accounts, watcher)
        write_samples(folder, outcome.start, outcome.final)
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # the run's boundary: whatever happened, the folder tells it
        end = _end_of(error)
        if end[0] in (EXIT_FAILED, EXIT_BAD_INPUT):
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        # From here to the end of the process: an impatient second Ctrl-C must not lose the summary.
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        watcher.stage("closing")
        if cluster is not None:
            cluster.close(keep_logs=folder / "logs" if end[0] == EXIT_FAILED else None)
        elif session is not None:
            shutil.rmtree(session, ignore_errors=True)
    write_atomically(folder / "state.json", accounts.state(PHASES.get(end[0], "failed")).to_json())
    return end[0], _summary(plan, accounts, outcome, end, time.perf_counter() - started_s)


def _connect(plan: RunPlan, session: Path | None) -> "Cluster":
    # Ray reads its authentication settings when it is imported: not before open_session.
    from actors.launch import connect

    cluster = connect(plan.config, plan.run_id, session)
    _write_ray_address(plan.run_folder, cluster.address, cluster.namespace)
    return cluster


def _run(plan: RunPlan, cluster: "Cluster", accounts: "Accounts", watcher: _Watcher) -> "Outcome":
    from actors.run import LearnerParts, Run
    from learners.group import LearnerGroup
    from learners.rank import LearnerRank

    run = Run(plan, cluster, LearnerParts(rank_class=LearnerRank, make_group=LearnerGroup), watcher, accounts)
    return asyncio.run(_with_signals(run.execute()))


def _end_of(error: BaseException) -> tuple[int, str]:
    """Exit code and text of what ended the run."""
    match error:
        case _Interrupted():
            return error.code, str(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "ended by SIGINT"
        case SystemExit():  # what Ray's own handler makes of a SIGTERM while it starts
            return EXIT_TERMINATED, "ended by SIGTERM"
        case ConfigError() | RewardError():
            return EXIT_BAD_INPUT, str(error)
        case _:
            return EXIT_FAILED, f"{type(error).__name__}: {error}"


def _summary(plan: RunPlan, accounts: "Accounts", outcome: "Outcome | None", end: tuple[int, str], wall_s: float) -> dict[str, object]:
    """The machine-readable last word. `end`: exit code and error text."""
    return {
        "run_id": plan.run_id,
        "algorithm": plan.config.algorithm.name,
        "exit": EXITS.get(end[0], "failed"),
        "exit_code": end[0],
        "error": end[1],
        "start_accuracy": outcome.start.accuracy if outcome else None,
        "final_accuracy": outcome.final.accuracy if outcome else None,
        "max_staleness": plan.config.max_staleness,
        "staleness_max": accounts.staleness_max,
        "updates": accounts.updates,
        "optimizer_steps": accounts.optimizer_steps,
        "prompts": accounts.prompts,
        "completions": accounts.completions,
        "tokens": accounts.tokens,
        "wall_s": wall_s,
        "train_wall_s": accounts.last_s - accounts.started_s,
        "generator_idle_share": accounts.generator_idle_share,
        "learner_idle_share": accounts.learner_idle_share,
        "dropped": dict(accounts.dropped),
        "model": str(plan.run_folder / "model") if outcome else None,
    }


class _Interrupted(Exception):
    """A signal asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.code = 128 + signum


def _raise_interrupted(signum: int, frame: object) -> None:
    del frame
    raise _Interrupted(signum)


async def _with_signals(main: Any) -> Any:
    """Await `main`; SIGINT and SIGTERM cancel it. Installed after ray.init, which overwrites handlers."""
    task = asyncio.ensure_future(main)
    received: list[int] = []

    def on_signal(signum: int) -> None:
        received.append(signum)
        task.cancel()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_signal, signum)
    try:
        return await task
    except BaseException as error:
        # While everything is being cancelled, anything may fail first; the cause is the signal all the same.
        if received:
            raise _Interrupted(received[0]) from error
        raise


def _write_ray_address(folder: Path, address: str, namespace: str) -> None:
    """Where `async-rlhf status` finds the live TrainingState; the token file's path, never the token."""
    entry = {"address": address, "namespace": namespace, "token_path": os.environ.get("RAY_AUTH_TOKEN_PATH", ""), "pid": os.getpid()}
    write_atomically(folder / "ray.json", json.dumps(entry) + "\n")


def _say_goodbye(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    if summary["exit"] != "success":
        say(f"{summary['exit']} after {summary['updates']} updates: {summary['error']}", "bold red")
        if (folder / "error.txt").is_file():
            say(f"where it happened: {folder / 'error.txt'}")
    else:
        say(
            f"held-out accuracy {summary['start_accuracy']:.3f} -> {summary['final_accuracy']:.3f} after {summary['updates']} updates "
            f"({summary['prompts']} prompts, {summary['completions']} completions, {summary['tokens']} tokens)",
            "bold green",
        )
        say(f"largest staleness trained: {summary['staleness_max']} (bound {summary['max_staleness']})")
        say(
            f"training took {summary['train_wall_s']:.1f} s of {summary['wall_s']:.1f} s; generators idle "
            f"{summary['generator_idle_share']:.0%}, learner idle {summary['learner_idle_share']:.0%}, both at work at once at least "
            f"{max(0.0, 1 - summary['generator_idle_share'] - summary['learner_idle_share']):.0%} of it"
        )
        say(f"policy: {summary['model']}")
    say(f"report: {folder / 'report.html'}")

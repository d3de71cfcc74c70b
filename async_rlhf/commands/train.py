"""`async-rlhf train`: check everything, run, and leave a complete run folder behind, however the run ends."""

import asyncio
import json
import os
import signal
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from async_rlhf.commands.sft import run_sft
from async_rlhf.config import Config
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.progress import Progress
from async_rlhf.prompts import check_model_folder
from async_rlhf.recorder import Recorder, make_run_folder, write_samples, write_summary
from async_rlhf.report import write_report
from async_rlhf.rewards import load_reward
from async_rlhf.state import TrainingState, write_atomically
from async_rlhf.tasks import load_task

if TYPE_CHECKING:
    from actors.accounts import Accounts
    from actors.run import Outcome

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143
EXITS = {EXIT_OK: "success", EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "terminated"}
"""`exit` in summary.json; any other code: failed."""
PHASES = {EXIT_OK: "finished", EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "interrupted"}
"""`phase` in state.json, likewise."""


def run_train(config: Config, console: Console) -> int:
    """Train; returns the process's exit code: 0, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.

    Raises:
        ConfigError: before any actor starts.
    """
    metric = load_task(config.task).reward
    reward = config.reward.function or metric
    load_reward(reward)
    if config.model.path:
        model_folder = Path(config.model.path).resolve()
        check_model_folder(model_folder)
    else:
        model_folder = run_sft(config, None, console)
    folder = make_run_folder(config)
    console.print(f"run folder: {folder}", markup=False, highlight=False, soft_wrap=True)
    with Progress(console, config.updates) as progress:
        watcher = _Watcher(progress, Recorder(folder))
        code, summary = _execute(config, folder, model_folder, (reward, metric), watcher)
        watcher.recorder.close()
    write_summary(folder, summary)
    write_report(folder)
    _say_goodbye(console, folder, summary)
    return code


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


def _execute(
    config: Config, folder: Path, model_folder: Path, rewards: tuple[str, str], watcher: _Watcher
) -> tuple[int, dict[str, object]]:
    """Run on Ray; returns the exit code and the summary, whatever happens."""
    from actors.session import open_session

    session = open_session()
    from actors.launch import connect
    from actors.run import LearnerParts, Run, RunPlan
    from learners.group import LearnerGroup
    from learners.rank import LearnerRank

    started_s = time.perf_counter()
    plan = RunPlan(
        config=config,
        run_id=folder.name,
        run_folder=folder,
        model_folder=model_folder,
        reward=rewards[0],
        metric=rewards[1],
    )
    outcome, end = None, (EXIT_OK, "")
    watcher.stage(f"joining Ray at {os.environ['RAY_ADDRESS']}" if session is None else "starting Ray")
    cluster = connect(config, folder.name, session)
    run = Run(plan, cluster, LearnerParts(rank_class=LearnerRank, make_group=LearnerGroup), watcher)
    try:
        _write_ray_address(folder, cluster.address, cluster.namespace)
        outcome = asyncio.run(_with_signals(run.execute()))
        write_samples(folder, outcome.start, outcome.final)
    except (Exception, KeyboardInterrupt) as error:  # the run's boundary: whatever happened, the folder tells it
        end = _end_of(error)
        if end[0] == EXIT_FAILED:
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        watcher.stage("closing")
        cluster.close()
    write_atomically(folder / "state.json", run.accounts.state(PHASES.get(end[0], "failed")).to_json())
    return end[0], _summary(config, folder, run.accounts, outcome, end, time.perf_counter() - started_s)


def _end_of(error: BaseException) -> tuple[int, str]:
    """Exit code and text of what ended the run."""
    match error:
        case _Interrupted():
            return error.code, str(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "ended by SIGINT"
        case ConfigError() | RewardError():
            return EXIT_BAD_INPUT, str(error)
        case _:
            return EXIT_FAILED, f"{type(error).__name__}: {error}"


def _summary(
    config: Config, folder: Path, accounts: "Accounts", outcome: "Outcome | None", end: tuple[int, str], wall_s: float
) -> dict[str, object]:
    """The machine-readable last word. `end`: exit code and error text."""
    return {
        "run_id": folder.name,
        "algorithm": config.algorithm.name,
        "exit": EXITS.get(end[0], "failed"),
        "exit_code": end[0],
        "error": end[1],
        "start_accuracy": outcome.start.accuracy if outcome else None,
        "final_accuracy": outcome.final.accuracy if outcome else None,
        "max_staleness": config.max_staleness,
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
        "model": str(folder / "model") if outcome else None,
    }


class _Interrupted(Exception):
    """A signal asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.code = 128 + signum


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
    except asyncio.CancelledError:
        raise _Interrupted(received[0] if received else signal.SIGTERM) from None


def _write_ray_address(folder: Path, address: str, namespace: str) -> None:
    """Where `async-rlhf status` finds the live TrainingState; the token file's path, never the token."""
    entry = {"address": address, "namespace": namespace, "token_path": os.environ.get("RAY_AUTH_TOKEN_PATH", ""), "pid": os.getpid()}
    write_atomically(folder / "ray.json", json.dumps(entry) + "\n")


def _say_goodbye(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    if summary["exit"] != "success":
        say(f"{summary['exit']} after {summary['updates']} updates: {summary['error']}", "bold red")
    else:
        say(
            f"held-out accuracy {summary['start_accuracy']:.3f} -> {summary['final_accuracy']:.3f} after {summary['updates']} updates "
            f"({summary['prompts']} prompts, {summary['completions']} completions, {summary['tokens']} tokens)",
            "bold green",
        )
        say(f"largest staleness trained: {summary['staleness_max']} (bound {summary['max_staleness']})")
        say(
            f"training took {summary['train_wall_s']:.1f} s of {summary['wall_s']:.1f} s; generators idle "
            f"{summary['generator_idle_share']:.0%}, learner idle {summary['learner_idle_share']:.0%}"
        )
        say(f"policy: {summary['model']}")
    say(f"report: {folder / 'report.html'}")

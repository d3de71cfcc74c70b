"""Drive a run that is planned: Ray, signals, and a complete run folder, however the run ends. Shared by `train` and `resume`."""

import asyncio
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from async_rlhf.commands.guard import HEARTBEAT, guard_is_gone
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.evaluation import Evaluation
from async_rlhf.model_card import write_card
from async_rlhf.progress import Progress
from async_rlhf.recorder import Recorder, read_accuracies, write_samples, write_summary
from async_rlhf.report import write_report
from async_rlhf.run_plan import RunPlan
from async_rlhf.state import TrainingState, write_atomically

if TYPE_CHECKING:
    from actors.accounts import Accounts
    from actors.launch import Cluster
    from actors.run import Run

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143
EXITS = {EXIT_OK: "success", EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "terminated"}
"""`exit` in summary.json; any other code: failed."""
PHASES = {EXIT_OK: "finished", EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "interrupted"}
"""`phase` in state.json, likewise."""


def drive(plan: RunPlan, console: Console) -> int:
    """Run; returns the process's exit code: 0, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    with Progress(console, plan.config.updates) as progress, closing(Recorder(plan.run_folder)) as recorder:
        code, summary = _execute(plan, _Watcher(progress, recorder))
    write_summary(plan.run_folder, summary)
    if code == EXIT_OK:
        write_card(plan.run_folder, plan.config, plan.model_folder)
    write_report(plan.run_folder)
    _say_goodbye(console, plan.run_folder, summary)
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

    def rewound(self, version: int) -> None:
        self.recorder.cut_after(version)

    def incident(self, entry: Mapping[str, Any]) -> None:
        self.recorder.write_incident(entry)

    def evaluated(self, name: str, evaluation: Evaluation) -> None:
        write_samples(self.recorder.folder, name, evaluation)


def _execute(plan: RunPlan, watcher: _Watcher) -> tuple[int, dict[str, object]]:
    """Run on Ray; returns the exit code and the summary, whatever happens."""
    from actors.accounts import Accounts
    from actors.session import open_session

    started_s, folder = time.perf_counter(), plan.run_folder
    accounts = Accounts(config=plan.config, run_id=plan.run_id, session=plan.session)
    if plan.checkpoint is not None:
        accounts.earlier_s = plan.checkpoint.state.elapsed_s
        accounts.checkpoint = plan.checkpoint.version
        accounts.restore(plan.checkpoint.state)
    watcher.rewound(accounts.updates)
    write_atomically(folder / "state.json", accounts.state("starting").to_json())
    session, cluster, end = None, None, (EXIT_OK, "")
    signal.signal(signal.SIGTERM, _raise_interrupted)
    try:
        session = open_session()
        watcher.stage(f"joining Ray at {os.environ['RAY_ADDRESS']}" if session is None else "starting Ray")
        cluster = _connect(plan, session)
        _run(plan, cluster, accounts, watcher)
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # the run's boundary: whatever happened, the folder tells it
        end = _end_of(error)
        if end[0] in (EXIT_FAILED, EXIT_BAD_INPUT):
            (folder / "error.txt").write_text(f"{traceback.format_exc()}\n{_who_waits()}\n", encoding="utf-8")
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
    return end[0], _summary(plan, accounts, end, time.perf_counter() - started_s)


def _connect(plan: RunPlan, session: Path | None) -> "Cluster":
    # Ray reads its authentication settings when it is imported: not before open_session.
    from actors.launch import connect

    cluster = connect(plan.config, plan.run_id, session)
    _write_ray_address(plan.run_folder, cluster.address, cluster.namespace)
    return cluster


def _run(plan: RunPlan, cluster: "Cluster", accounts: "Accounts", watcher: _Watcher) -> None:
    from actors.learner_crew import LearnerParts
    from actors.run import Run
    from learners.group import LearnerGroup
    from learners.rank import LearnerRank

    run = Run(plan, cluster, LearnerParts(rank_class=LearnerRank, make_group=LearnerGroup), watcher, accounts)
    asyncio.run(_with_signals(run, plan))


def _who_waits() -> str:
    from actors.wait_graph import WAITS

    return WAITS.at_failure


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


def _summary(plan: RunPlan, accounts: "Accounts", end: tuple[int, str], wall_s: float) -> dict[str, object]:
    """The machine-readable last word. `end`: exit code and error text."""
    accuracy = read_accuracies(plan.run_folder)
    return {
        "run_id": plan.run_id,
        "algorithm": plan.config.algorithm.name,
        "exit": EXITS.get(end[0], "failed"),
        "exit_code": end[0],
        "error": end[1],
        "start_accuracy": accuracy.get("start"),
        "final_accuracy": accuracy.get("final"),
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
        "failed_prompts": dict(accounts.failed_prompts),
        "skipped_rows": dict(accounts.skipped_rows),
        "restarts": dict(accounts.restarts),
        "session": accounts.session,
        "checkpoint": accounts.checkpoint,
        "model": str(plan.run_folder / "model") if end[0] == EXIT_OK else None,
    }


class _Interrupted(Exception):
    """A signal asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.code = 128 + signum


def _raise_interrupted(signum: int, frame: object) -> None:
    del frame
    raise _Interrupted(signum)


async def _with_signals(run: "Run", plan: RunPlan) -> None:
    """Execute a run. The first SIGINT or SIGTERM lets it end with a checkpoint within `timeouts.stop_s`; a second one ends it at once.

    Handlers are installed after ray.init, which overwrites them.
    """
    task = asyncio.ensure_future(run.execute())
    received: list[int] = []
    loop = asyncio.get_running_loop()

    def on_signal(signum: int) -> None:
        received.append(signum)
        if len(received) > 1:
            task.cancel()
        else:
            run.stop()
            loop.call_later(plan.config.timeouts.stop_s, task.cancel)

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_signal, signum)
    beating = asyncio.ensure_future(_beat(plan, run))
    try:
        await task
    except BaseException as error:
        # While everything is being cancelled, anything may fail first; the cause is the signal all the same.
        if received:
            raise _Interrupted(received[0]) from error
        raise
    finally:
        beating.cancel()
    if received or run.stopping:
        raise _Interrupted(received[0] if received else signal.SIGTERM)


async def _beat(plan: RunPlan, run: "Run") -> None:
    """Show that this process lives, and stop the run when its guard does not."""
    while True:
        (plan.run_folder / HEARTBEAT).touch()
        if guard_is_gone():
            run.stop()
        await asyncio.sleep(plan.config.supervision.ping_s)


def _write_ray_address(folder: Path, address: str, namespace: str) -> None:
    """Where `async-rlhf status` finds the live TrainingState; the token file's path, never the token."""
    entry = {"address": address, "namespace": namespace, "token_path": os.environ.get("RAY_AUTH_TOKEN_PATH", ""), "pid": os.getpid()}
    write_atomically(folder / "ray.json", json.dumps(entry) + "\n")


def _say_goodbye(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    if summary["exit"] != "success":
        say(f"{summary['exit']} after {summary['updates']} updates: {summary['error']}", "bold red")
        if summary["exit"] == "failed" and (folder / "error.txt").is_file():
            say(f"where it happened: {folder / 'error.txt'}")
        if summary["exit_code"] != EXIT_BAD_INPUT:
            at = "the start" if summary["checkpoint"] is None else f"the checkpoint of version {summary['checkpoint']}"
            say(f"go on, from {at} and the journal: async-rlhf resume {folder}")
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

"""Drive a run that is planned: Ray, signals, and a complete run folder, however the run ends. Shared by `train` and `resume`."""

import asyncio
import json
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from async_rlhf.commands.guard import ECHO_S, beat_s, beating, guard_is_gone, is_guarded, show_life
from async_rlhf.commands.say import say
from async_rlhf.commands.signals import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    Interrupted,
    end_of,
    on_ray,
    until_signal,
)
from async_rlhf.evaluation import Findings, headline
from async_rlhf.evaluation_log import read_accuracies
from async_rlhf.evaluation_summary import summarize_evaluations
from async_rlhf.model_card import write_card
from async_rlhf.opponents import sample_opponent
from async_rlhf.progress import Progress
from async_rlhf.recorder import Recorder, without_secrets, write_summary, write_targets
from async_rlhf.report import write_report
from async_rlhf.run_plan import RunPlan
from async_rlhf.run_verdict import RunningVerdict, own_cores
from async_rlhf.state import TrainingState, write_atomically
from async_rlhf.verdict import Bottleneck
from async_rlhf.wandb_sink import WandbSink

if TYPE_CHECKING:
    from actors.accounts import Accounts
    from actors.launch import Cluster
    from actors.run import Run

EXITS = {EXIT_OK: "success", EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "terminated"}
"""`exit` in summary.json; any other code: failed."""
PHASES = {EXIT_OK: "finished", EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "interrupted"}
"""`phase` in state.json, likewise."""


def drive(plan: RunPlan, console: Console) -> int:
    """Run; returns the process's exit code: 0, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    with Progress(console, plan.config.updates) as progress, closing(_recorder(plan)) as recorder:
        code, summary = _execute(plan, _Watcher(progress, recorder, RunningVerdict(plan.config, own_cores(plan.config))))
        write_summary(plan.run_folder, summary)  # before a sink takes its time to close
    if code == EXIT_OK:
        write_card(plan.run_folder, plan.config, plan.model_folder)
    write_report(plan.run_folder)
    _say_goodbye(console, plan.run_folder, summary)
    return code


def _recorder(plan: RunPlan) -> Recorder:
    """JSON lines and TensorBoard, and what the config asks for beside them."""
    config, folder = plan.config, plan.run_folder
    sinks = {"Weights & Biases": lambda: WandbSink(folder, without_secrets(config))}
    return Recorder(folder, {} if config.run.wandb.mode == "off" else sinks)


class _Watcher:
    """Passes what happens on to the screen and to the run folder."""

    def __init__(self, progress: Progress, recorder: Recorder, running: RunningVerdict) -> None:
        self._progress = progress
        self._running = running
        self.verdict = ""
        """The last one; empty: too little is known."""
        self.recorder = recorder
        self.evaluations_dropped: Counter[str] = Counter()
        """By this driver: reason -> count."""

    def stage(self, text: str) -> None:
        self._progress.stage(text)

    def update(self, row: Mapping[str, float], state: TrainingState) -> None:
        self.recorder.write(row)
        verdict = self._running.add(row)
        self.verdict = "" if verdict.bottleneck is Bottleneck.UNKNOWN else verdict.text
        self._progress.update(row, state, self.verdict)

    def rewound(self, version: int) -> None:
        self.recorder.cut_after(version)
        self._running.clear()

    def incident(self, entry: Mapping[str, Any]) -> None:
        self.recorder.write_incident(entry)

    def evaluated(self, findings: Findings) -> None:
        row = self.recorder.write_evaluation(findings)
        self._progress.stage(headline(findings, row))

    def evaluation_dropped(self, version: int, reason: str, text: str) -> None:
        self.evaluations_dropped[reason] += 1
        self._progress.stage(f"the evaluation at version {version} is dropped: {text}")


def _execute(plan: RunPlan, watcher: _Watcher) -> tuple[int, dict[str, object]]:
    """Run on Ray; returns the exit code and the summary, whatever happens."""
    from actors.accounts import Accounts

    started_s, folder = time.perf_counter(), plan.run_folder
    accounts = Accounts(config=plan.config, run_id=plan.run_id, session=plan.session)
    if plan.checkpoint is not None:
        accounts.earlier_s = plan.checkpoint.state.elapsed_s
        accounts.checkpoint = plan.checkpoint.version
        accounts.restore(plan.checkpoint.state)
    watcher.rewound(accounts.updates)
    write_atomically(folder / "state.json", accounts.state("starting").to_json())
    end = (EXIT_OK, "")
    try:
        with ExitStack() as ending:
            with beating(folder, plan.config.supervision):  # until the run's own loop does
                cluster = ending.enter_context(on_ray(plan.config, plan.run_id, watcher.stage, logs=folder / "logs"))
                _write_ray_address(folder, cluster.address, cluster.namespace)
                sample_opponent(plan.config, folder, watcher.stage)
                run = _make_run(plan, cluster, accounts, watcher)
            asyncio.run(_with_signals(run, plan))
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # the run's boundary: whatever happened, the folder tells it
        end = end_of(error)
        if end[0] in (EXIT_FAILED, EXIT_BAD_INPUT):
            (folder / "error.txt").write_text(f"{traceback.format_exc()}\n{_who_waits()}\n", encoding="utf-8")
    write_targets(folder, "")
    write_atomically(folder / "state.json", accounts.state(PHASES.get(end[0], "failed")).to_json())
    summary = _summary(plan, accounts, end, time.perf_counter() - started_s)
    return end[0], {**summary, "evaluations_dropped": dict(watcher.evaluations_dropped), "verdict": watcher.verdict or None}


def _make_run(plan: RunPlan, cluster: "Cluster", accounts: "Accounts", watcher: _Watcher) -> "Run":
    from actors.exporter import metrics_address
    from actors.learner_crew import LearnerParts
    from actors.run import Run
    from learners.group import LearnerGroup
    from learners.rank import LearnerRank
    from learners.sending import SendingRank

    write_targets(plan.run_folder, metrics_address(cluster))
    rank_class = SendingRank if plan.config.weights.by_group else LearnerRank
    return Run(plan, cluster, LearnerParts(rank_class=rank_class, make_group=LearnerGroup), watcher, accounts)


def _who_waits() -> str:
    from actors.wait_graph import WAITS

    return WAITS.at_failure


def _summary(plan: RunPlan, accounts: "Accounts", end: tuple[int, str], wall_s: float) -> dict[str, object]:
    """The machine-readable last word. `end`: exit code and error text."""
    accuracy = read_accuracies(plan.run_folder)
    return {
        "run_id": plan.run_id,
        "algorithm": plan.config.algorithm.name,
        "exit": EXITS.get(end[0], "failed"),
        "exit_code": end[0],
        "error": end[1],
        "metric": plan.config.task.metric_name,
        "start_accuracy": accuracy.get("start"),
        "final_accuracy": accuracy.get("final"),
        **summarize_evaluations(plan.run_folder, separate_reward=plan.separate_reward),
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


async def _with_signals(run: "Run", plan: RunPlan) -> None:
    """Execute a run. The first SIGINT or SIGTERM lets it end with a checkpoint within `timeouts.stop_s`; a second one ends it at once."""
    beating = asyncio.ensure_future(_beat(plan, run))
    try:
        await until_signal(run.execute(), run.stop, plan.config.timeouts.stop_s, ECHO_S if is_guarded() else 0.0)
    finally:
        beating.cancel()
    if run.stopping:
        raise Interrupted(signal.SIGTERM)


async def _beat(plan: RunPlan, run: "Run") -> None:
    """Show that this process lives, and stop the run when its guard does not."""
    while True:
        show_life(plan.run_folder)
        if guard_is_gone():
            run.stop()
        await asyncio.sleep(beat_s(plan.config.supervision))


def _write_ray_address(folder: Path, address: str, namespace: str) -> None:
    """Where `async-rlhf status` finds the live TrainingState; the token file's path, never the token."""
    entry = {"address": address, "namespace": namespace, "token_path": os.environ.get("RAY_AUTH_TOKEN_PATH", ""), "pid": os.getpid()}
    write_atomically(folder / "ray.json", json.dumps(entry) + "\n")


def _say_goodbye(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    if summary["exit"] != "success":
        say(console, f"{summary['exit']} after {summary['updates']} updates: {summary['error']}", style="bold red")
        if summary["exit"] == "failed" and (folder / "error.txt").is_file():
            say(console, f"where it happened: {folder / 'error.txt'}")
        if summary["exit_code"] != EXIT_BAD_INPUT:
            at = "the start" if summary["checkpoint"] is None else f"the checkpoint of version {summary['checkpoint']}"
            say(console, f"go on, from {at} and the journal: async-rlhf resume {folder}")
    else:
        say(
            console,
            f"held-out {summary['metric']} {summary['start_accuracy']:.3f} -> {summary['final_accuracy']:.3f} "
            f"after {summary['updates']} updates "
            f"({summary['prompts']} prompts, {summary['completions']} completions, {summary['tokens']} tokens)",
            style="bold green",
        )
        beside = [f"KL to the reference {summary['kl_nats']:.3f} nats"] if summary["kl_nats"] is not None else []
        if summary["winrate"] is not None:
            beside.append(f"win-rate against {summary['evaluation']['final']['opponent']} {summary['winrate']:.3f}")
        if beside:
            say(console, ", ".join(beside))
        say(console, f"largest staleness trained: {summary['staleness_max']} (bound {summary['max_staleness']})")
        say(
            console,
            f"training took {summary['train_wall_s']:.1f} s of {summary['wall_s']:.1f} s; generators idle "
            f"{summary['generator_idle_share']:.0%}, learner idle {summary['learner_idle_share']:.0%}, both at work at once at least "
            f"{max(0.0, 1 - summary['generator_idle_share'] - summary['learner_idle_share']):.0%} of it",
        )
        if summary["verdict"]:
            say(console, f"verdict: {summary['verdict']}")
        say(console, f"policy: {summary['model']}")
    say(console, f"report: {folder / 'report.html'}")

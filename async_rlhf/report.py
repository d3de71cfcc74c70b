"""The report: one HTML page about a run, for people. It needs no network, no script and no other file."""

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rlhf.errors import ConfigError
from async_rlhf.evaluation import Evaluation
from async_rlhf.evaluation_log import LATEST, read_evaluation, read_evaluations
from async_rlhf.intervals import mean_interval
from async_rlhf.recorder import SECRET_MARKS, earlier_configs, read_rows
from async_rlhf.report_curves import render_curves
from async_rlhf.report_evaluations import render_evaluations
from async_rlhf.report_samples import GRADED, changes, kinds_of, render_samples
from async_rlhf.report_text import UNKNOWN, known, short, table_row, visible
from async_rlhf.run_verdict import verdict_of_folder
from async_rlhf.state import TrainingState, read_state, write_atomically
from async_rlhf.verdict import Verdict

SECRET = re.compile(rf"^(\s+[A-Z0-9_]*(?:{'|'.join(SECRET_MARKS)})[A-Z0-9_]*: ).*$", re.MULTILINE)
"""An environment variable that is named like a secret loses its value: reports are passed around."""
BOUND = r"^max_staleness: (\d+)"
ALGORITHM = r"^algorithm:\n(?:  .*\n)*?  name: (\S+)"
BADGES = {"success": "good", "failed": "bad"}
STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1b1c1e; --muted: #5a5f66; --line: #d9dce0; --grid: #e3e5e8;
  --first: #1d6fd0; --second: #c8541a; --good: #14713a; --bad: #b3261e; --warn: #855600; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1e2125; --ink: #e8eaed; --muted: #a3a9b1;
  --line: #383d44; --grid: #32373d; --first: #6cacf5; --second: #f0935e; --good: #5fc983; --bad: #ff8a80; --warn: #e6b450; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 34px 0 10px; } h3 { font-size: 15px; margin: 0; } p { margin: 6px 0; } .lead { font-size: 19px; }
.muted, .note, figcaption { color: var(--muted); } .good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.badge { display: inline-block; border: 1.5px solid; border-radius: 99px; padding: 1px 12px; font-size: 14px; font-weight: 600; }
.error { border-left: 4px solid; background: var(--card); padding: 8px 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
.pair, .curves { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; } .pair { grid-template-columns: 1.3fr 1fr; align-items: start; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; min-width: 0; margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px 5px 0; border-top: 1px solid var(--line); overflow-wrap: break-word; }
th { font-weight: 500; color: var(--muted); } thead th { font-size: 13px; } thead th, thead + tbody tr:first-child > *,
  tbody:first-child tr:first-child > * { border-top: 0; }
figcaption, .legend { font-size: 13.5px; } .legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 4px; }
.key { display: inline-block; width: 16px; border-top: 3px solid; margin-right: 6px; vertical-align: middle; }
.key.first { color: var(--first); } .key.second { color: var(--second); } .key.dashed { color: var(--muted); border-top: 2px dashed; }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
.samples td, pre { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.samples .fold summary { list-style: none; } .fold summary::after { content: " ... more"; color: var(--first); }
.fold[open] summary::after { content: ""; } .score { display: block; width: fit-content;
  margin-bottom: 3px; color: var(--muted); border: 1px solid var(--line); border-radius: 4px; padding: 0 4px; }
.numbers td, .numbers th { white-space: nowrap; } .scroll { overflow-x: auto; }
figure, tr { break-inside: avoid; } summary { cursor: pointer; }
@media (max-width: 760px) { .pair, .curves { grid-template-columns: minmax(0, 1fr); } }
@media print { body { background: #fff; font-size: 12px; } main { max-width: none; padding: 0; } .pair, .curves { gap: 8px; } }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What a run folder says, read once."""

    config: str
    """config.yaml as text."""
    state: TrainingState
    rows: Sequence[Mapping[str, float]]
    summary: Mapping[str, Any] | None
    """None: the run goes on, or was killed before its last word."""
    evaluations: tuple[Evaluation, Evaluation] | None
    """At the start, and the newest since; None unless the run got through both."""
    findings: Sequence[Mapping[str, Any]]
    """The rows of evaluations.jsonl; none in a run that has none."""
    verdict: Verdict | None
    """None where the config is not one that this version reads."""
    earlier_configs: Mapping[int, str]
    """Session -> the config that held until a resume changed it."""

    def configured(self, pattern: str) -> str | None:
        """What the first group of `pattern` finds in the config; None where it finds nothing."""
        found = re.search(pattern, self.config, re.MULTILINE)
        return found[1] if found else None


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html, whole or not at all; returns its path.

    Raises:
        ConfigError: the folder holds no run.
    """
    path = folder / "report.html"
    write_atomically(path, _page(_read_record(folder)))
    return path


def _read_record(folder: Path) -> RunRecord:
    state, config, summary = read_state(folder), folder / "config.yaml", folder / "summary.json"
    if not config.is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.yaml; give the folder that `train` printed")
    return RunRecord(
        config=config.read_text(encoding="utf-8"),
        state=state,
        rows=read_rows(folder),
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
        evaluations=_before_and_after(folder),
        findings=read_evaluations(folder),
        verdict=verdict_of_folder(folder),
        earlier_configs=earlier_configs(folder),
    )


def _before_and_after(folder: Path) -> tuple[Evaluation, Evaluation] | None:
    start = read_evaluation(folder, "start")
    newest = read_evaluation(folder, "final") or read_evaluation(folder, LATEST)
    return (start, newest) if start and newest else None


def _page(run: RunRecord) -> str:
    algorithm, bound = run.configured(ALGORITHM) or "algorithm not known", run.configured(BOUND)
    configs = [(f"The config until session {session} changed it", text) for session, text in run.earlier_configs.items()]
    parts = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
        f"<title>Report: {visible(run.state.run_id)}</title><style>{STYLE}</style></head><body><main>",
        _header(run, algorithm),
        f'<div class="pair"><div class="card">{_comparison(run)}</div><div class="card">{_numbers(run)}</div></div>',
        f"<h2>Evaluations</h2>{render_evaluations(run.findings)}",
        f"<h2>Curves</h2>{render_curves(run.rows, int(bound) if bound else None)}",
        f"<h2>Completions</h2>{render_samples(run.evaluations)}",
        "<h2>Config</h2>",
        *(_config(title, text) for title, text in [("The resolved config (config.yaml)", run.config), *configs]),
        "</main></body></html>\n",
    )
    return "\n".join(parts)


def _config(title: str, text: str) -> str:
    shown = visible(SECRET.sub(r"\1(hidden)", text))
    return f"<details><summary>{title}</summary><pre>{shown}</pre></details>"


def _header(run: RunRecord, algorithm: str) -> str:
    state, summary = run.state, run.summary
    exit_status, error = "still running / no summary", f"No summary.json: the run goes on, or it was killed. Last state: {state.phase}."
    if summary:
        exit_status, error = summary["exit"], summary["error"]
    colour = BADGES.get(exit_status, "warn")
    start, final = _accuracies(run)
    noun, form = _unit(run)
    lead = f"{noun} is not known: it is written when a run ends by itself."
    if start is not None and final is not None:
        moved = "rose" if final > start else "fell" if final < start else "stayed"
        lead = f"{noun} {moved}: <b>{start:{form}}</b> &rarr; <b>{final:{form}}</b>"
    return (
        f'<h1>{visible(state.run_id)}</h1><p><span class="badge {colour}">{visible(exit_status)}</span> '
        f"&ensp;{visible(algorithm)} &middot; update {state.version} of {state.num_updates} &middot; "
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(state.updated_at))}</p>"
        + (f'<p class="error {colour}">{short(error)}</p>' if error else "")
        + (f'<p id="verdict"><b>Verdict</b> {visible(run.verdict.text)}</p>' if run.verdict else "")
        + f'<h2>Before and after</h2><p class="lead">{lead}</p>'
    )


def _unit(run: RunRecord) -> tuple[str, str]:
    """What the task's metric is called, and how it is written: shares where every score is 0 or 1."""
    graded = run.evaluations and kinds_of(run.evaluations) is GRADED
    return ("Held-out score", ".3f") if graded else ("Held-out accuracy", ".1%")


def _accuracies(run: RunRecord) -> tuple[float | None, float | None]:
    if run.evaluations:
        return run.evaluations[0].accuracy, run.evaluations[1].accuracy
    return (run.summary["start_accuracy"], run.summary["final_accuracy"]) if run.summary else (None, None)


def _comparison(run: RunRecord) -> str:
    """The held-out problems and the batches, before and after."""
    start, final = _accuracies(run)
    noun, form = _unit(run)
    change = ""
    if start is not None and final is not None:
        change = f"{(final - start) * 100:+.1f} points" if form.endswith("%") else f"{final - start:+.3f}"
    body = [table_row(noun, *(UNKNOWN if value is None else f"<b>{value:{form}}</b>" for value in (start, final)), change)]
    if run.evaluations:
        kinds = [kind for kind, _, _ in changes(*run.evaluations)]
        better, worse, *_ = kinds_of(run.evaluations)
        label = "Right answers" if better == "fixed" else "Prompts"
        changed = f"{kinds.count(better)}&nbsp;{better}<br>{kinds.count(worse)}&nbsp;{'newly&nbsp;' if worse == 'broken' else ''}{worse}"
        body.append(table_row(f"{label}<br>95 % interval", *map(_right, run.evaluations), changed))
    for label, key in (
        ("Batch reward", "reward/mean"),
        ("KL to the start, nats", "rollout/kl_k1_nats"),
        ("Entropy, nats per token", "policy/entropy_nats"),
        ("Tokens per completion", "rollout/length_tokens"),
    ):
        known = [row[key] for row in run.rows if key in row]
        if known:
            body.append(table_row(label, f"{known[0]:z.3f}", f"{known[-1]:z.3f}", f"{known[-1] - known[0]:+.3f}"))
    head = "<tr><th>held-out problems, then first and last batch</th><th>before</th><th>after</th><th>change</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _numbers(run: RunRecord) -> str:
    """What the run did and what it cost."""
    state, summary = run.state, run.summary or {}
    bound = run.configured(BOUND)
    colour = "bad" if bound and state.staleness_max > int(bound) else "good"
    largest = f'<span class="{colour}">{state.staleness_max} (bound {bound or "not known"})</span>'
    body = [
        table_row("Updates", f"{state.version:,} of {state.num_updates:,}"),
        table_row("Optimizer steps", f"{state.optimizer_steps:,}"),
        table_row("Prompts trained", f"{state.prompts:,}"),
        table_row("Completions trained", f"{state.completions:,}"),
        table_row("Completion tokens trained", f"{state.tokens:,}"),
        table_row("Wall time, s", known(summary.get("wall_s"), ",.1f")),
        table_row("Training time, s", known(summary.get("train_wall_s", run.rows[-1]["time_s"] if run.rows else None), ",.1f")),
        table_row("Largest staleness trained", largest),
        table_row("Generators idle", known(summary.get("generator_idle_share"), ".1%")),
        table_row("Learner idle", known(summary.get("learner_idle_share"), ".1%")),
        *(table_row(label, _dropped(summary.get(key))) for label, key in (("Dropped groups", "dropped"), ("Skipped rows", "skipped_rows"))),
    ]
    return f"<table><tbody>{''.join(body)}</tbody></table>"


def _dropped(reasons: Mapping[str, int] | None) -> str:
    if reasons is None:
        return UNKNOWN
    # A failure's reason goes on with a message, which may differ each time: summary.json has them all.
    counts: Counter[str] = Counter()
    for reason, num in reasons.items():
        counts[reason.partition(":")[0].replace("_", " ")] += num
    return "<br>".join(f"{num:,} {short(reason)}" for reason, num in sorted(counts.items()) if num) or "none"


def _right(evaluation: Evaluation) -> str:
    scores, (low, high) = evaluation.scores, mean_interval(evaluation.scores)
    if any(score not in (0, 1) for score in scores):
        return f"{len(scores)} prompts<br>{low:.3f}&nbsp;to&nbsp;{high:.3f}"
    return f"{scores.count(1)}&nbsp;of&nbsp;{len(scores)}<br>{low * 100:.1f}&nbsp;to&nbsp;{high:.1%}"

"""The report: one HTML page about a run, for people. It needs no network, no script and no other file."""

import json
import re
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from async_rlhf.errors import ConfigError
from async_rlhf.evaluation import Evaluation, Sample
from async_rlhf.recorder import read_rows
from async_rlhf.report_curves import render_curves
from async_rlhf.state import TrainingState, read_state, write_atomically

MAX_SAMPLES = 40
MAX_TEXT = 800
"""Characters shown of one prompt or completion: three quarters from its start, the rest from its end."""
Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
PLAIN = "\n\t\u200c\u200d"
"""Control characters that stay as they are; Persian and emoji need the last two."""
SECRET = re.compile(r"^(\s+[A-Z0-9_]*(?:TOKEN|KEY|SECRET|PASSWORD)[A-Z0-9_]*: ).*$", re.MULTILINE)
"""An environment variable that is named like a secret loses its value: reports are passed around."""
UNKNOWN = '<span class="muted">not known</span>'

BOUND = r"^max_staleness: (\d+)"
ALGORITHM = r"^algorithm:\n(?:  .*\n)*?  name: (\S+)"
BADGES = {"success": "good", "failed": "bad"}
KINDS = {"fixed": "good", "broken": "bad", "still wrong": "muted", "still right": "muted"}

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
    """Start and final; None unless the run got through both."""

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
        evaluations=_read_evaluations(folder / "samples.json"),
    )


def _read_evaluations(file: Path) -> tuple[Evaluation, Evaluation] | None:
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for entry in found.values():
        entry["samples"] = tuple(Sample(**sample) for sample in entry["samples"])
    if found.keys() < {"start", "final"}:
        return None
    start, final = Evaluation(**found["start"]), Evaluation(**found["final"])
    return (start, final) if start.samples and final.samples else None


def wilson_interval(right: int, num: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927).

    (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n), p = right / num, z = 1.96.
    """
    share, square = right / num, Z_95**2 / num
    middle, half = share + square / 2, Z_95 * (share * (1 - share) / num + square / (4 * num)) ** 0.5
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def visible(text: str) -> str:
    """Text for HTML: escaped, and with no character that hides itself or reorders others."""
    return escape("".join(map(_seen, text)))


def _page(run: RunRecord) -> str:
    algorithm, bound = run.configured(ALGORITHM) or "algorithm not known", run.configured(BOUND)
    config = SECRET.sub(r"\1(hidden)", run.config)
    parts = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
        f"<title>Report: {visible(run.state.run_id)}</title><style>{STYLE}</style></head><body><main>",
        _header(run, algorithm),
        f'<div class="pair"><div class="card">{_comparison(run)}</div><div class="card">{_numbers(run)}</div></div>',
        f"<h2>Curves</h2>{render_curves(run.rows, int(bound) if bound else None)}",
        f"<h2>Sample problems</h2>{_samples(run)}",
        f"<h2>Config</h2><details><summary>The resolved config (config.yaml)</summary><pre>{visible(config)}</pre></details>",
        "</main></body></html>\n",
    )
    return "\n".join(parts)


def _header(run: RunRecord, algorithm: str) -> str:
    state, summary = run.state, run.summary
    exit_status, error = "still running / no summary", f"No summary.json: the run goes on, or it was killed. Last state: {state.phase}."
    if summary:
        exit_status, error = summary["exit"], summary["error"]
    colour = BADGES.get(exit_status, "warn")
    start, final = _accuracies(run)
    lead = "Held-out accuracy is not known: it is written when a run ends by itself."
    if start is not None and final is not None:
        moved = "rose" if final > start else "fell" if final < start else "stayed"
        lead = f"Held-out accuracy {moved}: <b>{start:.1%}</b> &rarr; <b>{final:.1%}</b>"
    return (
        f'<h1>{visible(state.run_id)}</h1><p><span class="badge {colour}">{visible(exit_status)}</span> '
        f"&ensp;{visible(algorithm)} &middot; update {state.version} of {state.num_updates} &middot; "
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(state.updated_at))}</p>"
        + (f'<p class="error {colour}">{_short(error)}</p>' if error else "")
        + f'<h2>Before and after</h2><p class="lead">{lead}</p>'
    )


def _accuracies(run: RunRecord) -> tuple[float | None, float | None]:
    if run.evaluations:
        return run.evaluations[0].accuracy, run.evaluations[1].accuracy
    return (run.summary["start_accuracy"], run.summary["final_accuracy"]) if run.summary else (None, None)


def _comparison(run: RunRecord) -> str:
    """The held-out problems and the batches, before and after."""
    start, final = _accuracies(run)
    change = f"{(final - start) * 100:+.1f} points" if start is not None and final is not None else ""
    body = [_row("Held-out accuracy", *(UNKNOWN if share is None else f"<b>{share:.1%}</b>" for share in (start, final)), change)]
    if run.evaluations:
        kinds = [kind for kind, _, _ in _pairs(*run.evaluations)]
        changed = f"{kinds.count('fixed')} fixed<br>{kinds.count('broken')} newly broken"
        body.append(_row("Right answers<br>95 % interval (Wilson)", *map(_right, run.evaluations), changed))
    for label, key in (
        ("Batch reward", "reward/mean"),
        ("KL to the start, nats", "rollout/kl_k1_nats"),
        ("Entropy, nats per token", "policy/entropy_nats"),
        ("Tokens per completion", "rollout/length_tokens"),
    ):
        known = [row[key] for row in run.rows if key in row]
        if known:
            body.append(_row(label, f"{known[0]:z.3f}", f"{known[-1]:z.3f}", f"{known[-1] - known[0]:+.3f}"))
    head = "<tr><th>held-out problems, then first and last batch</th><th>before</th><th>after</th><th>change</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _numbers(run: RunRecord) -> str:
    """What the run did and what it cost."""
    state, summary = run.state, run.summary or {}
    bound = run.configured(BOUND)
    colour = "bad" if bound and state.staleness_max > int(bound) else "good"
    largest = f'<span class="{colour}">{state.staleness_max} (bound {bound or "not known"})</span>'
    body = [
        _row("Updates", f"{state.version:,} of {state.num_updates:,}"),
        _row("Optimizer steps", f"{state.optimizer_steps:,}"),
        _row("Prompts trained", f"{state.prompts:,}"),
        _row("Completions trained", f"{state.completions:,}"),
        _row("Completion tokens trained", f"{state.tokens:,}"),
        _row("Wall time, s", _known(summary.get("wall_s"), ",.1f")),
        _row("Training time, s", _known(summary.get("train_wall_s", run.rows[-1]["time_s"] if run.rows else None), ",.1f")),
        _row("Largest staleness trained", largest),
        _row("Generators idle", _known(summary.get("generator_idle_share"), ".1%")),
        _row("Learner idle", _known(summary.get("learner_idle_share"), ".1%")),
        *(_row(label, _dropped(summary.get(key))) for label, key in (("Dropped groups", "dropped"), ("Skipped rows", "skipped_rows"))),
    ]
    return f"<table><tbody>{''.join(body)}</tbody></table>"


def _dropped(reasons: Mapping[str, int] | None) -> str:
    if reasons is None:
        return UNKNOWN
    # A failure's reason goes on with a message, which may differ each time: summary.json has them all.
    counts: Counter[str] = Counter()
    for reason, num in reasons.items():
        counts[reason.partition(":")[0].replace("_", " ")] += num
    return "<br>".join(f"{num:,} {_short(reason)}" for reason, num in sorted(counts.items()) if num) or "none"


def _samples(run: RunRecord) -> str:
    if run.evaluations is None:
        return '<p class="note">No sample problems: they are written when a run ends by itself.</p>'
    pairs = list(_pairs(*run.evaluations))
    by_kind = {kind: [pair for pair in pairs if pair[0] == kind] for kind in KINDS}
    # Fixed and broken by turns, so that many of one do not hide the few of the other.
    changed = [pair for turn in zip_longest(by_kind["fixed"], by_kind["broken"]) for pair in turn if pair is not None]
    chosen = sorted((changed + by_kind["still wrong"] + by_kind["still right"])[:MAX_SAMPLES], key=lambda pair: [*KINDS].index(pair[0]))
    body = "".join(
        f'<tr><td><span class="{KINDS[kind]}">{kind}</span></td><td>{_short(start.prompt)}</td><td>{_short(start.expected)}</td>'
        f"<td>{_answer(start)}</td><td>{_answer(final)}</td></tr>"
        for kind, start, final in chosen
    )
    counts = ", ".join(f"{len(by_kind[kind])} {kind}" for kind in KINDS)
    return (
        f'<p class="note">{len(chosen)} of {len(pairs)} held-out problems ({counts}); those that changed come first.</p>'
        '<div class="card"><table class="samples"><thead><tr><th style="width: 7.5em"></th><th>prompt</th><th>expected</th>'
        f"<th>answer before</th><th>answer after</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _pairs(start: Evaluation, final: Evaluation) -> Iterator[tuple[str, Sample, Sample]]:
    """(kind, before, after) of each problem in the order of the start: a second generator may answer in another order."""
    later: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in reversed(final.samples):
        later[sample.prompt, sample.expected].append(sample)
    for before in start.samples:
        found = later[before.prompt, before.expected]
        if found:
            after = found.pop()
            better, same = after.score > before.score, after.score == before.score
            yield ("still right" if after.score >= 1 else "still wrong") if same else "fixed" if better else "broken", before, after


def _answer(sample: Sample) -> str:
    mark = '<b class="good" title="right">&#10003;</b>' if sample.score >= 1 else '<b class="bad" title="wrong">&#10007;</b>'
    partly = f" <span class=muted>({sample.score:.3g})</span>" if sample.score not in (0, 1) else ""
    return f"{mark}{partly} {_short(sample.completion) or '<span class=muted>(empty)</span>'}"


def _right(evaluation: Evaluation) -> str:
    scores = [sample.score for sample in evaluation.samples]
    if any(score not in (0, 1) for score in scores):
        return f'{len(scores)} problems<br><span class="muted">no interval: scores are not 0 or 1</span>'
    low, high = wilson_interval(scores.count(1), len(scores))
    return f"{scores.count(1)}&nbsp;of&nbsp;{len(scores)}<br>{low * 100:.1f}&nbsp;to&nbsp;{high:.1%}"


def _row(label: str, *cells: str) -> str:
    return f'<tr><th scope="row">{label}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _known(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def _short(text: str) -> str:
    """Visible text, with its middle left out when it is long."""
    head, middle, tail = text[: MAX_TEXT * 3 // 4], text[MAX_TEXT * 3 // 4 : -MAX_TEXT // 4], text[-MAX_TEXT // 4 :]
    left_out = f'<span class="muted"> [{len(middle):,} characters left out] </span>'
    return visible(text) if len(text) <= MAX_TEXT else visible(head) + left_out + visible(tail)


def _seen(character: str) -> str:
    code = ord(character)
    if character in PLAIN or unicodedata.category(character) not in HIDDEN:
        return character
    return chr(0x2400 + code) if code < 32 else f"[U+{code:04X}]"

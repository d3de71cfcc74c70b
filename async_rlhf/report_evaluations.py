"""The evaluations in the report: their numbers, their curves, and score against KL."""

# matplotlib leaves the types of its keyword arguments open.
# pyright: reportUnknownMemberType=false
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from async_rlhf.curves import EVALUATION_CURVES
from async_rlhf.report_curves import draw_curves
from async_rlhf.report_text import visible
from async_rlhf.svg import COLOURS, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

MAX_ROWS = 12
"""Of the table; more evaluations are thinned out, the first and the last one stay."""
MAX_NAMED = 5
"""Points of the frontier that carry their version."""
SMALLEST_P = 0.001
"""Smaller p-values are not told apart."""
NAME_OFFSET = (5, 4)
"""Of a name from its point, in points of the page."""


def render_evaluations(rows: Sequence[Row]) -> str:
    """Table, curves and frontiers; one sentence where there are no evaluations.

    Args:
        rows: those of evaluations.jsonl, by version.
    """
    if not rows:
        return '<p class="note">No evaluations were recorded.</p>'
    drawable = [_numbers(row) for row in rows]
    figures = draw_curves(EVALUATION_CURVES, drawable, None) + "".join(
        _frontier(rows, key, name, noun)
        for key, name, noun in (
            ("evaluate/sampled_score", "frontier-score", "score"),
            ("evaluate/sampled_reward", "frontier-reward", "trained reward"),
        )
    )
    opponents = sorted({row["opponent"] for row in rows if row["opponent"]})
    compared = f" Win-rates are against {visible(', '.join(opponents))}." if opponents else ""
    note = (
        "95 % intervals: Wilson's where every score is 0 or 1, else a bootstrap over the prompts; p: sign test."
        f"{compared} An evaluation made while training went on names all versions that sampled it."
    )
    return f'<div class="card scroll">{_table(rows)}</div><p class="note">{note}</p><div class="curves">{figures}</div>'


def _numbers(row: Row) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


def _table(rows: Sequence[Row]) -> str:
    chosen = rows
    if len(rows) > MAX_ROWS:
        chosen = [rows[round(index)] for index in np.linspace(0, len(rows) - 1, MAX_ROWS)]
    columns = (
        ("score, greedy", "score", "score", "z.3f"),
        ("change since the start", "score_change", "score_change", "+z.3f"),
        ("reward, greedy", "reward", "reward", "z.3f"),
        ("win-rate", "winrate", "winrate", ".3f"),
        ("score, sampled", "sampled_score", "sampled_score", "z.3f"),
        ("KL, nats", "kl_nats", "", "z.3f"),
        ("tokens", "length_tokens", "", ".1f"),
        ("cut", "cut_share", "", ".1%"),
    )
    shown = [column for column in columns if any(f"evaluate/{column[1]}" in row for row in rows)]
    head = "".join(f"<th>{label}</th>" for label, *_ in shown)
    body = "".join(
        f'<tr><th scope="row">{_span(row)}</th>{"".join(f"<td>{_cell(row, *column[1:])}</td>" for column in shown)}</tr>' for row in chosen
    )
    return f'<table class="numbers"><thead><tr><th>versions</th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _span(row: Row) -> str:
    oldest, newest = row["version_min"], row["version_max"]
    return f"{newest}" if oldest == newest else f"{oldest} to {newest}"


def _cell(row: Row, name: str, interval: str, form: str) -> str:
    value = row.get(f"evaluate/{name}")
    if value is None:
        return f'<span class="bad" title="{visible(row["problem"])}">failed</span>' if name == "winrate" and row["problem"] else ""
    text = f"<b>{value:{form}}</b>"
    if interval:
        text += f'<br><span class="muted">{row[f"evaluate/{name}_low"]:{form}} to {row[f"evaluate/{name}_high"]:{form}}</span>'
    if f"evaluate/{name}_p" in row:
        text += f'<br><span class="muted">p {_p_value(row[f"evaluate/{name}_p"])}</span>'
    if name == "kl_nats" and "evaluate/kl_error_nats" in row:
        text += f'<br><span class="muted">&plusmn; {row["evaluate/kl_error_nats"]:.3f}</span>'
    return text


def _p_value(p: float) -> str:
    return f"{p:.3f}" if p >= SMALLEST_P else f"&lt; {SMALLEST_P}"


def _frontier(rows: Sequence[Row], key: str, name: str, noun: str) -> str:
    """What was gained for how far the policy went: one point per evaluation, joined in their order."""
    points = [row for row in rows if key in row and "evaluate/kl_nats" in row]
    if len(points) < 2:
        return ""
    title, caption = (
        f"{noun.capitalize()} against KL",
        f"Each point is an evaluation: up is more {noun}, right is further from the reference. A line that bends down is over-optimized.",
    )

    def draw(axes: "Axes") -> None:
        _plot_frontier(axes, points, key, name)
        axes.set_xlabel("KL to the reference, nats per completion", color=COLOURS["muted"])
        axes.set_ylabel(f"{noun}, sampled", color=COLOURS["muted"])

    legend = '<span><i class="key second"></i>sampled completions, 95 % intervals</span>'
    svg = draw_svg(name, f"{title}. {caption}", draw)
    head = f'<figure id="curve-{name}"><h3>{escape(title)}</h3><p class="legend">{legend}</p>'
    return f"{head}{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _plot_frontier(axes: "Axes", points: Sequence[Row], key: str, name: str) -> None:
    x, y, low, high = (
        np.array([row[wanted] for row in points], dtype=np.float64) for wanted in ("evaluate/kl_nats", key, f"{key}_low", f"{key}_high")
    )
    left, right = (np.array([row.get(f"evaluate/kl_nats_{end}", row["evaluate/kl_nats"]) for row in points]) for end in ("low", "high"))
    colour = COLOURS["second"]
    axes.vlines(x, low, high, color=colour, alpha=0.35, linewidth=1.0, gid=f"{name}:intervals")
    axes.hlines(y, left, right, color=colour, alpha=0.35, linewidth=1.0, gid=f"{name}:kl-intervals")
    axes.plot(x, y, color=colour, linewidth=1.2, alpha=0.7, marker="o", markersize=3.5, gid=f"{name}:points")
    for index in sorted({round(place) for place in np.linspace(0, len(points) - 1, min(MAX_NAMED, len(points)))}):
        text = "start" if points[index]["stage"] == "start" else f"v{points[index]['version']}"
        axes.annotate(text, (x[index], y[index]), NAME_OFFSET, textcoords="offset points", color=COLOURS["ink"], fontsize=7.5)

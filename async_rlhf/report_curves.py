"""The curves of the report: what is drawn, and how it becomes inline SVG that follows the page's colours."""

# matplotlib leaves the types of its keyword arguments open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, float]
Values = np.ndarray[tuple[int], np.dtype[np.float64]]

MAX_POINTS = 1000
"""Of one line; longer runs are thinned out, so that the page stays small."""
MAX_MARKED = 60
"""Up to so many points get a dot, so that one update alone is seen."""
DRAWABLE = 1e30
"""Larger values, like infinite ones, leave a gap: they would overflow the axis."""
MAX_LINEAR_RATIO = 8.0
"""Two lines whose largest values lie further apart than this share a logarithmic axis."""
SIZE_INCHES = (4.9, 2.3)

# matplotlib writes these; the page's style sheet gives each its colour in light and in dark mode.
COLOURS = {"first": "#010101", "second": "#020202", "muted": "#030303", "grid": "#040404"}


@dataclass(frozen=True, slots=True)
class Line:
    """One metric in a curve."""

    key: str
    label: str
    colour: Literal["first", "second"] = "first"
    peaks: bool = False
    """Thinning keeps each stretch's maximum instead of its last value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One figure over the policy version."""

    name: str
    title: str
    y_label: str
    """Quantity and unit."""
    caption: str
    """One sentence: how to read it."""
    lines: tuple[Line, ...]
    smoothed: bool = False
    """Adds a running mean; the values themselves turn pale."""
    signed: bool = False
    """May fall below zero; else the axis starts there."""
    percent: bool = False
    bounded: bool = False
    """Draws the staleness bound."""


CURVES = (
    Curve(
        name="reward",
        title="Reward",
        y_label="score per completion",
        caption="Higher is better: pale is each batch's mean score, bold its running mean.",
        signed=True,
        lines=(Line("reward/mean", "batch mean"),),
        smoothed=True,
    ),
    Curve(
        name="kl",
        title="KL to the start",
        y_label="KL (k1), nats per completion",
        caption="How far the policy went from the frozen start: a steep rise without more reward means over-optimization.",
        signed=True,
        lines=(Line("rollout/kl_k1_nats", "sampling policy"), Line("policy/kl_k1_nats", "trained policy", "second")),
    ),
    Curve(
        name="entropy",
        title="Policy entropy",
        y_label="entropy, nats per token",
        caption="How much choice is left in each token: a fall to zero means that the policy stopped exploring.",
        lines=(Line("policy/entropy_nats", "trained policy"),),
    ),
    Curve(
        name="staleness",
        title="Staleness",
        y_label="staleness, updates",
        caption="Updates made between sampling and training of a group: the maximum must never rise above the dashed bound.",
        lines=(Line("queue/staleness_max", "maximum", "second", peaks=True), Line("queue/staleness_mean", "mean")),
        bounded=True,
    ),
    Curve(
        name="throughput",
        title="Throughput",
        y_label="tokens per second",
        caption="Completion tokens sampled per second, and all tokens trained per second of training alone: steady is healthy.",
        lines=(Line("generate/tokens_per_s", "generators"), Line("train/tokens_per_s", "learner", "second")),
    ),
    Curve(
        name="idle",
        title="Idle shares",
        y_label="idle, % of wall time",
        caption="The side that idles waits for the other one: give hardware to the side that does not.",
        lines=(Line("generate/idle_share", "generators"), Line("train/idle_share", "learner", "second")),
        percent=True,
    ),
    Curve(
        name="depth",
        title="Queue depth",
        y_label="waiting groups",
        caption="Finished groups left waiting after the batch was taken: zero means that the learner is faster than the generators.",
        lines=(Line("queue/depth_groups", "groups"),),
    ),
    Curve(
        name="wait",
        title="Learner wait",
        y_label="wait per update, s",
        caption="Seconds that the learner waited for its batch: time in which it could have trained.",
        lines=(Line("queue/wait_s", "wait"),),
    ),
    Curve(
        name="loss",
        title="Training loss",
        y_label="loss (no unit)",
        caption="Pale is each update's loss, bold its running mean: look for jumps, its level alone says little here.",
        signed=True,
        lines=(Line("train/loss", "loss"),),
        smoothed=True,
    ),
    Curve(
        name="grad_norm",
        title="Gradient norm",
        y_label="L2 norm (no unit)",
        caption="Before clipping: spikes warn of instability, and zero means that nothing was learned.",
        lines=(Line("train/grad_norm", "norm", peaks=True),),
    ),
    Curve(
        name="install",
        title="Weight install",
        y_label="install time, s",
        caption="Seconds that the slowest generator needed for its last install, canary included: it samples nothing meanwhile.",
        lines=(Line("weights/install_s", "slowest generator", peaks=True),),
    ),
    Curve(
        name="length",
        title="Completion length",
        y_label="tokens per completion",
        caption="A drift to the length limit, or to nearly nothing, often shows a reward that is being gamed.",
        lines=(Line("rollout/length_tokens", "batch mean"),),
    ),
)


def render_curves(rows: Sequence[Row], bound: int | None) -> str:
    """All CURVES as HTML figures with inline SVG; one sentence where there is nothing to draw.

    Args:
        rows: one per update, in order.
        bound: the largest staleness that the run allows; None where unknown.
    """
    if not rows:
        return '<p class="note">no updates yet</p>'
    figures = "".join(_figure(curve, rows, bound) for curve in CURVES)
    return f'<div class="curves">{figures}</div>{_notes(rows)}'


def running_mean(values: Values, window: int) -> Values:
    """Mean over the last `window` values at each place; what is not finite counts for nothing."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    num = counts[last] - counts[first]
    return np.where(num > 0, (sums[last] - sums[first]) / np.maximum(num, 1), np.nan)


def thin(values: Values, *, peaks: bool) -> Values:
    """At most MAX_POINTS values: the last of each stretch, or its maximum. The last value always stays."""
    ends = _ends(len(values))
    if not peaks:
        return values[ends]
    return np.fmax.reduceat(values, np.concatenate([[0], ends[:-1] + 1]))


def _ends(num: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(num - 1, -1, -math.ceil(num / MAX_POINTS))[::-1]


def _series(rows: Sequence[Row], key: str) -> Values:
    values = np.array([row.get(key, math.nan) for row in rows], dtype=np.float64)
    return np.where(np.abs(values) < DRAWABLE, values, np.nan)


def _window(num_rows: int) -> int:
    return max(5, num_rows // 20)


def _notes(rows: Sequence[Row]) -> str:
    notes = [f"x axis: policy version, the number of completed updates. Running means cover {_window(len(rows))} updates."]
    if len(rows) > MAX_POINTS:
        stretch = math.ceil(len(rows) / MAX_POINTS)
        notes.append(f"Of {len(rows)} updates one in {stretch} is drawn; maxima, gradient norms and install times keep their peaks.")
    keys = [line.key for curve in CURVES for line in curve.lines]
    bad = sum(not math.isfinite(row[key]) for row in rows for key in keys if key in row)
    if bad:
        notes.append(f"{bad} values were not finite numbers and leave gaps.")
    return f'<p class="note">{" ".join(notes)}</p>'


def _figure(curve: Curve, rows: Sequence[Row], bound: int | None) -> str:
    drawn = {line.key: _series(rows, line.key) for line in curve.lines if any(line.key in row for row in rows)}
    head = f'<figure id="curve-{curve.name}"><h3>{escape(curve.title)}</h3>'
    foot = f"<figcaption>{escape(curve.caption)}</figcaption></figure>"
    if not drawn:
        return f'{head}<p class="note">not measured in this run</p>{foot}'
    legend: list[str] = []
    for line in curve.lines:
        if line.key in drawn:
            last = rows[-1].get(line.key, math.nan)
            shown = f"{last:.0%}" if curve.percent else f"{last:,.0f}" if abs(last) >= 1000 else f"{last:.3g}"
            legend.append(f'<span><i class="key {line.colour}"></i>{escape(line.label)}, last {shown}</span>')
    if curve.bounded and bound is not None:
        legend.append(f'<span><i class="key dashed"></i>bound {bound}</span>')
    return f'{head}<p class="legend">{"".join(legend)}</p>{_svg(curve, drawn, _series(rows, "version"), bound)}{foot}'


def _svg(curve: Curve, drawn: Mapping[str, Values], versions: Values, bound: int | None) -> str:
    # Imported here: `async-rlhf --help` must not wait for matplotlib.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    text = io.StringIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "async-rlhf", "font.size": 8.5, "axes.formatter.limits": (-3, 5)}
    with rc_context(settings):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for line in curve.lines:
            if line.key in drawn:
                _plot(axes, curve, line, versions, drawn[line.key])
        _dress(axes, curve, drawn, bound)
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(text.getvalue(), curve)


def _plot(axes: "Axes", curve: Curve, line: Line, versions: Values, values: Values) -> None:
    x, y = versions[_ends(len(versions))], thin(values, peaks=line.peaks) * (100.0 if curve.percent else 1.0)
    colour, marker = COLOURS[line.colour], "o" if len(x) <= MAX_MARKED else ""
    width, alpha = (1.0, 0.4) if curve.smoothed else (1.4, 1.0)
    axes.plot(x, y, color=colour, linewidth=width, alpha=alpha, marker=marker, markersize=2.5, gid=f"{curve.name}:{line.key}")
    if curve.smoothed:
        smooth = thin(running_mean(values, _window(len(values))), peaks=False)
        axes.plot(x, smooth, color=colour, linewidth=2.0, gid=f"{curve.name}:{line.key}:smoothed")


def _dress(axes: "Axes", curve: Curve, drawn: Mapping[str, Values], bound: int | None) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.set_xlabel("policy version (updates)", color=COLOURS["muted"])
    axes.set_ylabel(curve.y_label, color=COLOURS["muted"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.tick_params(color=COLOURS["grid"], labelcolor=COLOURS["muted"], which="both")
    axes.grid(True, axis="y", color=COLOURS["grid"], linewidth=0.7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["grid"])
    largest = [float(np.nanmax(values)) for values in drawn.values() if np.any(values > 0)]
    if curve.bounded and bound is not None:
        axes.axhline(bound, color=COLOURS["muted"], linestyle=(0, (4, 3)), linewidth=1.2, gid=f"{curve.name}:bound")
        largest.append(bound)
    if len(largest) > 1 and not (curve.signed or curve.percent or curve.bounded) and max(largest) > MAX_LINEAR_RATIO * min(largest):
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylabel(f"{curve.y_label} (log)", color=COLOURS["muted"])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    elif curve.percent:
        axes.set_ylim(-2, 102)
    elif not curve.signed:
        axes.set_ylim(0, max([*largest, 1e-9]) * 1.08 if largest else 1.0)


def _inline(svg: str, curve: Curve) -> str:
    """The bare <svg> element: page colours, own ids, two decimals, and no address of any kind."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|width|height)="[^"]*"', "", svg, count=4)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;]*;", "", svg).replace("xlink:href", "href")
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), svg)
    svg = re.sub(r'(\sid="|"#|url\(#)', rf"\g<1>{curve.name}-", svg)
    about = f"{curve.title}, {curve.y_label}, over the policy version. {curve.caption}"
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(about)}"', 1).replace(">", f"><title>{escape(about)}</title>", 1)

"""The curves of the report as inline SVG that follows the page's colours; what is drawn stands in `curves.py`."""

# matplotlib leaves the types of its keyword arguments open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from async_rlhf.curves import CURVES, Curve, Line, part_curves
from async_rlhf.svg import COLOURS, draw_svg

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
BAND_ALPHA = 0.16


def render_curves(rows: Sequence[Row], bound: int | None) -> str:
    """All CURVES, and the parts of the reward, as HTML figures with inline SVG; one sentence where there is nothing to draw.

    Args:
        rows: one per update, in order.
        bound: the largest staleness that the run allows; None where unknown.
    """
    if not rows:
        return '<p class="note">no updates yet</p>'
    return f'<div class="curves">{draw_curves((*CURVES, *part_curves(rows)), rows, bound)}</div>{_notes(rows)}'


def draw_curves(curves: Sequence[Curve], rows: Sequence[Row], bound: int | None) -> str:
    """One HTML figure for each of the curves, those without data left out where they ask for it.

    Args:
        rows: one per version, in order.
        bound: see render_curves.
    """
    measured = {key for row in rows for key in row}
    shown = [curve for curve in curves if not curve.only_where_measured or measured & {line.key for line in curve.lines}]
    return "".join(_figure(curve, rows, bound) for curve in shown)


def running_mean(values: Values, window: int) -> Values:
    """Mean over the last `window` values at each place; what cannot be drawn counts for nothing."""
    known = np.abs(values) <= DRAWABLE
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    num = counts[last] - counts[first]
    return np.where(num > 0, (sums[last] - sums[first]) / np.maximum(num, 1), np.nan)


def thin(values: Values, *, peaks: bool, max_points: int = MAX_POINTS) -> Values:
    """At most `max_points` values: the last of each stretch, or its maximum. The last value always stays."""
    ends = _ends(len(values), max_points)
    if not peaks:
        return values[ends]
    return np.fmax.reduceat(values, np.concatenate([[0], ends[:-1] + 1]))


def _ends(num: int, max_points: int = MAX_POINTS) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(num - 1, -1, -math.ceil(num / max_points))[::-1]


def _series(rows: Sequence[Row], key: str) -> Values:
    values = np.array([row.get(key, math.nan) for row in rows], dtype=np.float64)
    return np.where(np.abs(values) < DRAWABLE, values, np.nan)


def smoothing_window(num_rows: int) -> int:
    """Updates that a running mean covers."""
    return max(5, num_rows // 20)


def _notes(rows: Sequence[Row]) -> str:
    notes = [f"x axis: policy version, the number of completed updates. Running means cover {smoothing_window(len(rows))} updates."]
    if len(rows) > MAX_POINTS:
        stretch = math.ceil(len(rows) / MAX_POINTS)
        notes.append(f"Of {len(rows)} updates one in {stretch} is drawn; maxima, gradient norms and install times keep their peaks.")
    keys = [line.key for curve in CURVES for line in curve.lines]
    bad = sum(not math.isfinite(row[key]) for row in rows for key in keys if key in row)
    if bad:
        notes.append(f"{bad} values were not finite numbers and leave gaps.")
    return f'<p class="note">{" ".join(notes)}</p>'


def _figure(curve: Curve, rows: Sequence[Row], bound: int | None) -> str:
    drawn = {line.key for line in curve.lines if any(line.key in row for row in rows)}
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
    if curve.level is not None:
        legend.append(f'<span><i class="key dashed"></i>{escape(curve.level_label)}</span>')
    if curve.bounded and bound is not None:
        legend.append(f'<span><i class="key dashed"></i>bound {bound}</span>')
    return f'{head}<p class="legend">{"".join(legend)}</p>{_svg(curve, rows, bound)}{foot}'


def _svg(curve: Curve, rows: Sequence[Row], bound: int | None) -> str:
    drawn = {line.key: _series(rows, line.key) for line in curve.lines if any(line.key in row for row in rows)}
    versions = _series(rows, "version")

    def draw(axes: "Axes") -> None:
        for line in curve.lines:
            if line.key in drawn:
                if line.banded:
                    _shade(axes, curve, line, versions, rows)
                _plot(axes, curve, line, versions, drawn[line.key])
        _dress(axes, curve, drawn, bound)

    return draw_svg(curve.name, f"{curve.title}, {curve.y_label}, over the policy version. {curve.caption}", draw)


def _shade(axes: "Axes", curve: Curve, line: Line, versions: Values, rows: Sequence[Row]) -> None:
    """The interval around a line."""
    low, high = (_series(rows, f"{line.key}_{end}") * (100.0 if curve.percent else 1.0) for end in ("low", "high"))
    at = _ends(len(versions))
    gid = f"{curve.name}:{line.key}:interval"
    axes.fill_between(versions[at], low[at], high[at], color=COLOURS[line.colour], alpha=BAND_ALPHA, linewidth=0, gid=gid)


def _plot(axes: "Axes", curve: Curve, line: Line, versions: Values, values: Values) -> None:
    x, y = versions[_ends(len(versions))], thin(values, peaks=line.peaks) * (100.0 if curve.percent else 1.0)
    colour, marker = COLOURS[line.colour], "o" if len(x) <= MAX_MARKED else ""
    width, alpha = (1.0, 0.4) if curve.smoothed else (1.4, 1.0)
    axes.plot(x, y, color=colour, linewidth=width, alpha=alpha, marker=marker, markersize=2.5, gid=f"{curve.name}:{line.key}")
    if curve.smoothed:
        smooth = thin(running_mean(values, smoothing_window(len(values))), peaks=False)
        axes.plot(x, smooth, color=colour, linewidth=2.0, gid=f"{curve.name}:{line.key}:smoothed")


def _dress(axes: "Axes", curve: Curve, drawn: Mapping[str, Values], bound: int | None) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.set_xlabel("policy version (updates)", color=COLOURS["muted"])
    axes.set_ylabel(curve.y_label, color=COLOURS["muted"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    largest = [float(np.nanmax(values)) for values in drawn.values() if np.any(values > 0)]
    if curve.bounded and bound is not None:
        axes.axhline(bound, color=COLOURS["muted"], linestyle=(0, (4, 3)), linewidth=1.2, gid=f"{curve.name}:bound")
        largest.append(bound)
    if curve.level is not None:
        axes.axhline(curve.level, color=COLOURS["muted"], linestyle=(0, (4, 3)), linewidth=1.2, gid=f"{curve.name}:level")
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

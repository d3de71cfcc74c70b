"""Figures of plans as SVG files that stand alone."""

# matplotlib leaves the types of its keyword arguments open.
# pyright: reportUnknownMemberType=false
import io
from collections.abc import Mapping, Sequence
from typing import Any

from async_rlhf.planning.plans import Plan

Line = Sequence[tuple[float, float]]


def draw_plans(plans: Sequence[Plan]) -> str:
    """Updates per hour over the number of generators, one line for each number of ranks and bound."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for plan in plans:
        name = f"{plan.config.learner.num_ranks} ranks, bound {plan.config.max_staleness}"
        lines.setdefault(name, []).append((plan.config.generator.count, plan.prediction.updates_per_h))
    return draw_lines({name: sorted(line) for name, line in lines.items()}, "generators", "updates per hour")


def draw_lines(lines: Mapping[str, Line], x_label: str, y_label: str, *, logarithmic: bool = False) -> str:
    """Named lines over one x axis, as an SVG file on white.

    Args:
        logarithmic: both axes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    text = io.StringIO()
    settings: dict[Any, Any] = {"svg.hashsalt": "async-rlhf", "font.size": 9}
    with rc_context(settings):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for name, line in lines.items():
            axes.plot([x for x, _ in line], [y for _, y in line], marker="o", markersize=3.5, label=name)
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()

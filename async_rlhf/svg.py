"""Figures as inline SVG that follows the page's colours, in light and in dark mode."""

# matplotlib leaves the types of its keyword arguments open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (4.9, 2.3)
AXES = (0.17, 0.2, 0.81, 0.75)
"""Left, bottom, width and height in the figure: fixed, because a layout found by trial draws everything twice."""

# matplotlib writes these; the page's style sheet gives each its colour in light and in dark mode.
COLOURS = {"first": "#010101", "second": "#020202", "muted": "#030303", "grid": "#040404", "ink": "#050505"}


def draw_svg(name: str, about: str, draw: "Callable[[Axes], None]") -> str:
    """One pair of axes, dressed for the page, as an <svg> element.

    Args:
        name: of the figure; begins every id in it.
        about: what it shows, for those who cannot see it.
        draw: puts the lines in.
    """
    # Imported here: `async-rlhf --help` must not wait for matplotlib.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    text = io.StringIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "async-rlhf", "font.size": 8.5, "axes.formatter.limits": (-3, 5)}
    with rc_context(settings):
        figure = Figure(figsize=SIZE_INCHES)
        axes = figure.add_axes(AXES)
        axes.tick_params(color=COLOURS["grid"], labelcolor=COLOURS["muted"], which="both")
        axes.grid(True, axis="y", color=COLOURS["grid"], linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(COLOURS["grid"])
        draw(axes)
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(text.getvalue(), name, about)


def _inline(svg: str, name: str, about: str) -> str:
    """The bare <svg> element: page colours, own ids, two decimals, and no address of any kind."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|width|height)="[^"]*"', "", svg, count=4)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;]*;", "", svg).replace("xlink:href", "href")
    for colour, code in COLOURS.items():
        svg = svg.replace(code, f"var(--{colour})")
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), svg)
    svg = re.sub(r'(\sid="|"#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(about)}"', 1).replace(">", f"><title>{escape(about)}</title>", 1)

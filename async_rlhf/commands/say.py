"""How commands print."""

from rich.console import Console


def say(console: Console, *lines: str, style: str | None = None) -> None:
    """Print lines as they are: no markup, no highlighting, no wrapping of paths."""
    for line in lines:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

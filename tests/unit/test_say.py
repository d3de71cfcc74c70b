"""Commands print what they were given, whatever it looks like."""

import io

from rich.console import Console

from async_rlhf.commands.say import say


def test_brackets_and_long_paths_are_printed_as_they_are_each_on_its_line():
    console, path = Console(file=io.StringIO(), width=20), "/a/long/path/" * 5

    say(console, "[bold]not markup[/bold]", path, style="bold red")

    assert console.file.getvalue() == f"[bold]not markup[/bold]\n{path}\n"

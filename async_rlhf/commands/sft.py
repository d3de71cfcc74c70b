"""`async-rlhf sft`: make the supervised start, or find it finished in the cache."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from async_rlhf.config.schema import Config
from async_rlhf.sft import SFTProgress, SFTResult, cached_start, start_folder, train_start


def run_sft(config: Config, folder: Path | None, console: Console) -> Path:
    """Make the start, showing its progress, and return its folder.

    Args:
        config: task, model and sft settings.
        folder: where to put it; None: into the cache, where a finished start with the same settings is used at once.
        console: a terminal gets a progress bar, anything else one line per evaluation.
    Raises:
        ConfigError: the folder is taken, or the settings cannot work.
        RunError: not one held-out problem is answered right.
    """
    if folder is None and (cached := cached_start(config)) is not None:
        facts = json.loads((cached / "start.json").read_text(encoding="utf-8"))
        _say(console, f"start: {cached} (in the cache; held-out accuracy {facts['accuracy']:.3f}; delete the folder to make it again)")
        return cached
    with _show_bar(config, console) if console.is_terminal else _show_lines(console) as on_progress:
        result = train_start(config, start_folder(config) if folder is None else folder, on_progress)
    _say(console, _describe(result))
    return result.folder


def _describe(result: SFTResult) -> str:
    return f"start: {result.folder} (held-out accuracy {result.accuracy:.3f} after {result.steps} steps, {result.elapsed_s:.0f} s)"


@contextmanager
def _show_lines(console: Console) -> Generator[Callable[[SFTProgress], None]]:
    """One line per evaluation."""

    def on_progress(progress: SFTProgress) -> None:
        if progress.looked:
            _say(console, f"sft step {progress.step}: {_measured(progress)}, {progress.elapsed_s:.0f} s")

    yield on_progress


@contextmanager
def _show_bar(config: Config, console: Console) -> Generator[Callable[[SFTProgress], None]]:
    """A bar that counts steps up to sft.max_steps; training usually reaches the target long before its end."""
    columns = (
        TextColumn("sft"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[measured]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        row = bar.add_task("sft", total=config.sft.max_steps, measured=f"target accuracy {config.sft.target_accuracy:.2f}")

        def on_progress(progress: SFTProgress) -> None:
            bar.update(row, completed=progress.step, measured=_measured(progress))

        yield on_progress


def _measured(progress: SFTProgress) -> str:
    if progress.loss is None or progress.accuracy is None:
        return "not evaluated yet"
    return f"loss {progress.loss:.3f}, held-out accuracy {progress.accuracy:.3f}"


def _say(console: Console, line: str) -> None:
    """Print one line as it is: no markup, no highlighting, no wrapping of paths."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)

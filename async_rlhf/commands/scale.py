"""`async-rlhf scale`: have a living run take on more generators, or fewer, from any machine that sees its folder."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from async_rlhf.commands.guard import HEARTBEAT
from async_rlhf.commands.say import say
from async_rlhf.config import Config, load_config
from async_rlhf.errors import ConfigError, DeadlineError, RunError
from async_rlhf.scaling import WANTED_FILE, Answer, Wish, make_wish, read_answer, read_wish, write_wish
from async_rlhf.state import LIVE_PHASES, STATE_FILE, read_state

POLL_S = 0.5


def run_scale(folder: Path, words: Sequence[str], timeout_s: float, console: Console) -> None:
    """Wish, wait, and say what became of it.

    Args:
        timeout_s: longest wait for the driver; 0: what the run's own deadlines allow.
    Raises:
        ConfigError: the words make no sense, or no such run lives. RunError: the run refused, or could not do all of it.
        DeadlineError: it is not through in time; the wish stands.
    """
    wish = make_wish(words)
    state = read_state(folder)
    if state.phase not in LIVE_PHASES:
        raise ConfigError(f"{folder} must be a run that goes on, got one that is {state.phase}; {_instead(folder, wish)}")
    config = load_config([folder / "config.yaml"]).config
    if config.deterministic:
        raise ConfigError(f"{folder} is deterministic and keeps its generators: other ones would sample in other batches")
    write_wish(folder, wish)
    _check_life(folder, config, wish)
    limits = config.timeouts
    _follow(folder, wish, timeout_s or limits.place_s + limits.start_s + limits.weights_s + limits.leave_s, config, console)


def _follow(folder: Path, wish: Wish, timeout_s: float, config: Config, console: Console) -> None:
    """Print each line of the answer as it comes, until the last one."""
    told, ends = 0, time.monotonic() + timeout_s
    while time.monotonic() < ends:
        newest, answer = read_wish(folder), _answer(folder, wish)
        if answer is not None:
            last = answer.outcome != "working"
            for line in answer.lines[told : len(answer.lines) - last]:
                say(console, line)
            told = len(answer.lines)
            if answer.outcome == "failed":
                raise RunError(answer.lines[-1] if answer.lines else "the run did not say why")
            if last:
                say(console, *answer.lines[-1:], style="bold green")
                return
        if newest is not None and newest.wish_id != wish.wish_id:
            raise RunError(
                f"overtaken by another wish, for {newest.generators} generator(s), before the run was through with this; "
                f"see async-rlhf status {folder}"
            )
        if (phase := read_state(folder).phase) not in LIVE_PHASES:
            raise RunError(f"the run is {phase} now, before it was through with this; {_instead(folder, wish)}")
        _check_life(folder, config, wish)
        time.sleep(POLL_S)
    raise DeadlineError(
        f"the run is not through with this after {timeout_s:g} s, and goes on with it: see async-rlhf status {folder}, or ask for "
        "another number"
    )


def _answer(folder: Path, wish: Wish) -> Answer | None:
    answer = read_answer(folder)
    return answer if answer is not None and answer.wish_id == wish.wish_id else None


def _check_life(folder: Path, config: Config, wish: Wish) -> None:
    """Raise ConfigError, and take the wish back, if the driver has given no sign of life for longer than a frozen process is given.

    A sign's age is measured by the clock of the storage: this machine's may be another one.
    """
    signs = [folder / HEARTBEAT, folder / STATE_FILE]
    probe = folder / f".{WANTED_FILE}.clock-{wish.wish_id}"
    try:
        probe.touch()
        silent_s = probe.stat().st_mtime - max((sign.stat().st_mtime for sign in signs if sign.is_file()), default=0.0)
    finally:
        probe.unlink(missing_ok=True)
    limit_s = config.supervision.silence_s + config.supervision.ping_s
    if silent_s > limit_s:
        (folder / WANTED_FILE).unlink(missing_ok=True)
        raise ConfigError(
            f"{folder} must be a run that goes on, but its driver gave no sign of life for {silent_s:.0f} s: it was killed, or sees "
            f"another folder; {_instead(folder, wish)}"
        )


def _instead(folder: Path, wish: Wish) -> str:
    return f"to go on with that many generators: async-rlhf resume {folder} generator.count={wish.generators}"

"""How a process that drives actors ends: its exit codes, and what it does with SIGINT and SIGTERM."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from async_rlhf.config import Config
from async_rlhf.errors import ConfigError, RewardError

Result = TypeVar("Result")

if TYPE_CHECKING:
    from actors.launch import Cluster

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143


class Interrupted(Exception):
    """A signal asked the process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.code = 128 + signum


def end_of(error: BaseException) -> tuple[int, str]:
    """Exit code and text of what ended a command."""
    match error:
        case Interrupted():
            return error.code, str(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "ended by SIGINT"
        case SystemExit():  # what Ray's own handler makes of a SIGTERM while it starts
            return EXIT_TERMINATED, "ended by SIGTERM"
        case ConfigError() | RewardError():
            return EXIT_BAD_INPUT, str(error)
        case _:
            return EXIT_FAILED, f"{type(error).__name__}: {error}"


@contextmanager
def interruptible() -> Generator[None]:
    """Inside, SIGINT and SIGTERM raise Interrupted; to be entered again after each `ray.init`, which installs handlers of its own."""
    previous = {signum: signal.signal(signum, _raise_interrupted) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def on_ray(config: Config, run_id: str, say: Callable[[str], None], logs: Path | None = None) -> Generator["Cluster"]:
    """A connection to Ray for as long as the block lasts; a Ray of our own ends with it.

    From the block's end on SIGINT and SIGTERM are ignored: an impatient second Ctrl-C must lose nothing.

    Args:
        run_id: names the actors' namespace.
        say: gets a line before each stage that takes a while.
        logs: where the logs of a Ray of our own go if the block fails.
    """
    from actors.session import open_session

    session, cluster, failed = None, None, False
    signal.signal(signal.SIGINT, _raise_interrupted)
    signal.signal(signal.SIGTERM, _raise_interrupted)
    try:
        session = open_session()
        say("starting Ray" if session is not None else f"joining Ray at {os.environ['RAY_ADDRESS']}")
        # Ray reads its authentication settings when it is imported: not before open_session.
        from actors.launch import connect

        cluster = connect(config, run_id, session, say)
        yield cluster
    except BaseException as error:
        failed = end_of(error)[0] == EXIT_FAILED
        raise
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        say("closing")
        if cluster is not None:
            cluster.close(keep_logs=logs if failed else None)
        elif session is not None:
            shutil.rmtree(session, ignore_errors=True)


async def until_signal(
    work: Coroutine[Any, Any, Result], stop: Callable[[], None] | None = None, stop_s: float = 0.0, echo_s: float = 0.0
) -> Result:
    """Await `work`. The first SIGINT or SIGTERM calls `stop` and gives it `stop_s` to end; a second one, or the first without `stop`,
    cancels it.

    Handlers are installed after ray.init, which overwrites them.

    Args:
        echo_s: the same signal once more within so many seconds is the first one, by another way.
    Raises:
        Interrupted: there was a signal, however the work ended.
    """
    task = asyncio.ensure_future(work)
    received: list[int] = []
    loop = asyncio.get_running_loop()
    echo_until: dict[int, float] = {}

    def on_signal(signum: int) -> None:
        if loop.time() < echo_until.get(signum, 0.0):
            return
        echo_until[signum] = loop.time() + echo_s
        received.append(signum)
        if len(received) > 1 or stop is None:
            task.cancel()
        else:
            stop()
            loop.call_later(stop_s, task.cancel)

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_signal, signum)
    try:
        result = await task
    except BaseException as error:
        # While everything is being cancelled, anything may fail first; the cause is the signal all the same.
        if received:
            raise Interrupted(received[0]) from error
        raise
    if received:
        raise Interrupted(received[0])
    return result


def _raise_interrupted(signum: int, frame: object) -> None:
    del frame
    raise Interrupted(signum)

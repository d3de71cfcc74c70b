"""SIGINT and SIGTERM: the first lets the work end by itself, the second ends it."""

import asyncio
import os
import signal

import pytest

from async_rlhf.commands.signals import Interrupted, end_of, interruptible, until_signal
from async_rlhf.errors import ConfigError, RewardError, RunError


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def test_first_signal_asks_the_work_to_stop_and_waits_for_its_end():
    ended: list[str] = []

    async def work(stopped: asyncio.Event) -> None:
        send(signal.SIGTERM)
        await stopped.wait()
        ended.append("with a checkpoint")

    async def main() -> None:
        stopped = asyncio.Event()
        await until_signal(work(stopped), stopped.set, 60.0)

    with pytest.raises(Interrupted) as caught:
        asyncio.run(main())

    assert ended == ["with a checkpoint"]
    assert end_of(caught.value) == (143, "ended by SIGTERM")


@pytest.mark.parametrize(("signals", "stop_s"), [(2, 60.0), (1, 0.05)])
def test_second_signal_or_the_deadline_ends_work_that_does_not_stop(signals: int, stop_s: float):
    async def stubborn() -> None:
        for _ in range(signals):
            send(signal.SIGINT)
            await asyncio.sleep(0.01)
        await asyncio.sleep(60)

    async def main() -> None:
        async with asyncio.timeout(10):
            await until_signal(stubborn(), lambda: None, stop_s)

    with pytest.raises(Interrupted) as caught:
        asyncio.run(main())

    assert caught.value.code == 130


def test_same_signal_by_another_way_is_one_signal_and_a_different_one_is_the_second():
    """A job's end signals the driver, and its guard, which passes it on."""

    async def work(stopped: asyncio.Event) -> None:
        send(signal.SIGTERM)
        await stopped.wait()
        send(signal.SIGTERM)
        await asyncio.sleep(0.05)
        reached.append("past the echo")
        send(signal.SIGINT)
        await asyncio.sleep(60)

    async def main() -> None:
        stopped = asyncio.Event()
        async with asyncio.timeout(10):
            await until_signal(work(stopped), stopped.set, 60.0, echo_s=30.0)

    reached: list[str] = []
    with pytest.raises(Interrupted) as caught:
        asyncio.run(main())

    assert reached == ["past the echo"]
    assert caught.value.code == 143


def test_work_without_a_signal_gives_its_result_and_its_errors():
    async def seven() -> int:
        return 7

    async def failing() -> None:
        raise RunError("no")

    assert asyncio.run(until_signal(seven())) == 7
    with pytest.raises(RunError, match="no"):
        asyncio.run(until_signal(failing()))


def test_signal_inside_plain_code_is_raised_there_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="ended by SIGTERM"), interruptible():
        send(signal.SIGTERM)
        signal.pause()

    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("x"), 2), (RewardError("x"), 2), (RunError("x"), 1), (KeyboardInterrupt(), 130), (SystemExit(), 143)]
)
def test_every_end_has_its_exit_code(error: BaseException, code: int):
    assert end_of(error)[0] == code

"""A process that calls one reward function: `python -m async_rlhf.rewards.worker FILE_DESCRIPTOR FUNCTION`.

It gets Texts and answers ("scores", list of float), or ("failed", what happened). It ends with whoever started it.
"""

import asyncio
import inspect
import os
import queue
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from async_rlhf.errors import AsyncRLHFError
from async_rlhf.rewards.base import Texts, WorkerAnswer, checked_scores
from async_rlhf.rewards.functions import RewardFunction, call_with, load_reward, reward_name


def serve(connection: Connection, path: str) -> None:
    """Import the function, then answer calls until the other end is closed."""
    try:
        function = load_reward(path)
    except AsyncRLHFError as error:
        connection.send(("broken", str(error)))
        return
    connection.send(("ready", None))
    calls: queue.SimpleQueue[Texts] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, calls), daemon=True).start()
    while True:
        connection.send(_answer(function, calls.get()))


def _receive(connection: Connection, calls: "queue.SimpleQueue[Texts]") -> None:
    """Beside the function, which may be busy for ever when the other end dies."""
    try:
        while True:
            calls.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _answer(function: RewardFunction, texts: Texts) -> WorkerAnswer:
    try:
        answer: Any = call_with(function, texts)
        answer = asyncio.run(answer) if inspect.iscoroutine(answer) else answer
        answer = list(answer) if hasattr(answer, "__next__") else answer
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    try:
        return "scores", checked_scores(reward_name(function), answer, texts).tolist()
    except AsyncRLHFError as error:
        return "broken", str(error)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2])

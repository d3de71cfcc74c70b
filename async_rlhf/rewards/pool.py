"""A reward function in processes of its own: a slow call blocks nobody, an endless one is ended."""

import math
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe

import numpy as np

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.rewards.attempts import NoAnswerError, Patience, TryAgainError, given_up, pause_s
from async_rlhf.rewards.base import Rating, Texts, WorkerAnswer, described, texts_of
from async_rlhf.types import Prompt

START_S = 120.0
"""The function's module may import much."""


class WorkerProcess:
    """One process with the function imported. Started anew, never forked: engines and torch do not survive that."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
        words = [sys.executable, "-m", "async_rlhf.rewards.worker", str(theirs.fileno()), path]
        with theirs:
            self._process = subprocess.Popen(words, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def wait_ready(self) -> None:
        """Wait until the function is imported.

        Raises:
            ConfigError: it is not importable there, or not in time.
        """
        kind, value = self._receive(START_S)
        if kind != "ready":
            self.close()
            raise ConfigError(f"a worker process for {self._path} did not start: {value}")

    def call(self, texts: Texts, deadline_s: float) -> WorkerAnswer:
        """The function's answer; or `failed`, or `late`: then the process is dead."""
        try:
            self._connection.send(texts)
        except OSError:
            self.close()
            return "failed", "the worker process died"
        return self._receive(deadline_s)

    @property
    def alive(self) -> bool:
        """Whether it may be called again."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it, whatever it does; from any thread: whoever waits for its answer learns of that."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """The same where nobody else uses it any more: the connection ends, too."""
        self.kill()
        self._connection.close()

    def _receive(self, limit_s: float) -> WorkerAnswer:
        kind = "failed"
        try:
            if self._connection.poll(limit_s):
                return self._connection.recv()
            kind, why = "late", f"no answer within {limit_s:g} s (deadline_s); its process was killed and replaced"
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):  # the connection ends a moment before the process
                self._process.wait(1.0)
            why = f"the worker process died (exit code {self._process.poll()}) and was replaced"
        self.close()
        return kind, why


class PooledFunctionReward:
    """`settings.processes` workers; each call of the function has a deadline, and further attempts after a failure."""

    def __init__(self, path: str, settings: RewardPartConfig) -> None:
        """
        Raises:
            ConfigError: the function is not importable.
        """
        self._path = path
        self._settings = settings
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(settings.processes, thread_name_prefix="reward")
        self._patience = Patience()
        self._closed = False
        self._workers = {WorkerProcess(path) for _ in range(settings.processes)}
        try:
            for worker in self._workers:
                worker.wait_ready()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
        """See Reward. Each call gets at most `batch_size` completions, and no more than keeps all processes busy."""
        texts = texts_of(prompts, completions)
        num = len(texts.completions)
        size = max(1, min(self._settings.batch_size, math.ceil(num / self._settings.processes)))
        calls = [self._threads.submit(self._score, texts.part(begin, begin + size)) for begin in range(0, num, size)]
        try:
            scores = [call.result() for call in calls]
        except BaseException:
            for call in calls:
                call.cancel()
            raise
        return Rating(scores=np.array([score for part in scores for score in part], dtype=np.float32))

    def close(self) -> None:
        """See Reward. Calls that go on are ended."""
        self._closed = True
        for worker in set(self._workers):
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _score(self, texts: Texts) -> list[float]:
        worker = self._idle.get()
        failures: list[Exception] = []
        try:
            for attempt in range(self._settings.retries + 1):
                if attempt:
                    time.sleep(pause_s(self._settings, attempt))
                if self._closed:
                    break
                if not worker.alive:
                    worker = self._replaced(worker)
                kind, value = worker.call(texts, self._settings.deadline_s)
                if kind != "late":
                    self._patience.answered()
                if kind == "scores":
                    return value
                if kind == "broken":
                    raise RewardError(value)
                failures.append(NoAnswerError(value) if kind == "late" else TryAgainError(value))
        finally:
            self._idle.put(worker)
        failures = failures or [TryAgainError("closed")]
        size = f"{len(texts.completions)} completions, the first " if len(texts.completions) > 1 else ""
        raise self._patience.tried(given_up(failures, f"reward function {self._path} for {size}{described(texts, 0)}"))

    def _replaced(self, dead: WorkerProcess) -> WorkerProcess:
        worker = WorkerProcess(self._path)
        self._workers.discard(dead)
        self._workers.add(worker)
        worker.wait_ready()
        return worker

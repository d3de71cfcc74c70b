"""What each stage of the pipeline takes by itself: the ideal that an update is held against.

Two processes, each on a core of its own, without Ray, queue or driver: the generator samples without a pause, as many groups in flight
as in a run, while on the other core the learner trains (and the scorer scores) the same batch again and again. So each stage is measured
while the other core is as busy as a run keeps it, and none waits for another.
"""

import multiprocessing
import os
import statistics
import threading
import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from async_rlhf.config import Config, load_config

WARM_UP = 1
"""Steps that are not counted."""
STANDING_IN = tuple(f"w{number}" for number in range(41))
"""Words that no text has: a policy of random weights says each token about as often, so its end comes once in 64."""


def score(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[str]) -> list[float]:
    """A reward without ties: every group has a best and a worst completion."""
    del prompts, columns
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """Seconds for one update's work."""

    generate_s: float
    train_s: float
    gather_s: float
    score_s: float
    length_tokens: float
    """Of the completions in it, in the mean."""

    def at(self, length_tokens: float) -> "StageTimes":
        """For completions of another mean length: lengths end by chance, and 256 of them by 5 % more or less."""
        share = length_tokens / self.length_tokens
        return replace(
            self,
            generate_s=self.generate_s * share,
            train_s=self.train_s * share,
            score_s=self.score_s * share,
            length_tokens=length_tokens,
        )

    @property
    def learner_side_s(self) -> float:
        """What shares the learner's core in turn."""
        return self.train_s + self.gather_s + self.score_s

    @property
    def ideal_s(self) -> float:
        """All overlaps, nothing waits, nothing costs anything besides."""
        return max(self.generate_s, self.learner_side_s)

    @property
    def free_ideal_s(self) -> float:
        """The same on two cores among which the scorer's work moves freely."""
        return max(self.generate_s, self.train_s + self.gather_s, (self.generate_s + self.learner_side_s) / 2)


def make_start(folder: Path, *, hidden_size: int = 128, num_layers: int = 4) -> Path:
    """A policy of random weights: completions end by chance, after 64 tokens in the mean, or at the limit."""
    from async_rlhf.config.schema import ModelConfig
    from async_rlhf.tasks.arithmetic import VOCABULARY
    from async_rlhf.tasks.start import build_policy, build_tokenizer

    tokenizer = build_tokenizer(replace(VOCABULARY, tokens=VOCABULARY.tokens + STANDING_IN))
    config = ModelConfig(hidden_size=hidden_size, num_layers=num_layers, num_heads=4, intermediate_size=3 * hidden_size)
    build_policy(config, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure_stages(settings: Sequence[str], folder: Path, seconds: float) -> StageTimes:
    """The stages of a run of the quickstart with these settings, which samples with the policy of `folder`.

    Args:
        seconds: for how long the learner trains.
    """
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(2)]
    cores = sorted(os.sched_getaffinity(0))
    workers = [
        context.Process(target=work, args=(far, list(settings), str(folder), cores[index % len(cores)]), daemon=True)
        for index, ((_, far), work) in enumerate(zip(ends, (_generate, _learn), strict=True))
    ]
    for worker in workers:
        worker.start()
    (generator, _), (learner, _) = ends
    try:
        for (near, far), worker in zip(ends, workers, strict=True):
            far.close()
            _answer(near, worker)
        generator.send("begin")
        groups = _answer(generator, workers[0])
        num_tokens = sum(group.num_tokens for group in groups)
        learner.send(groups)
        _answer(learner, workers[1])  # warm
        generator.send("measure")
        learner.send(seconds)
        train_s, gather_s, score_s = _answer(learner, workers[1])
        generator.send("end")
        generate_s = num_tokens * _answer(generator, workers[0])
        length_tokens = num_tokens / sum(len(group.rollouts) for group in groups)
        return StageTimes(generate_s=generate_s, train_s=train_s, gather_s=gather_s, score_s=score_s, length_tokens=length_tokens)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _answer(end: Connection, worker: Any) -> Any:
    try:
        return end.recv()
    except EOFError:
        worker.join(10)
        raise SystemExit(f"a stage ended with exit code {worker.exitcode}; its error stands above") from None


def _settle(settings: Sequence[str], core: int) -> Config:
    """As an actor of a run would be set up, on one core."""
    from actors.environment import ACTOR_ENVIRONMENT

    os.sched_setaffinity(0, {core})
    os.environ.update(ACTOR_ENVIRONMENT)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return load_config(["conf/quickstart.yaml"], list(settings)).config


def _generate(end: Connection, settings: Sequence[str], folder: str, core: int) -> None:
    """Sample for ever; answer with a batch, then with the seconds that a token took between `measure` and `end`."""
    config = _settle(settings, core)
    from actors.generator import Generator
    from async_rlhf.prompts import PromptCursor, make_stream
    from async_rlhf.snapshot import snapshot_of_folder
    from async_rlhf.types import RolloutGroup, Ticket

    generator = Generator(config, folder, "bare")
    generator.install(snapshot_of_folder(Path(folder), config.generator.dtype))
    prompts = make_stream(config, Path(folder), PromptCursor(epoch=0, index=0))
    issued = 0

    def submit(count: int) -> int:
        nonlocal issued
        drawn = [found for found in (prompts.draw() for _ in range(count)) if found is not None]  # it never ends
        tickets = [
            Ticket(ticket_id=issued + i, prompt=prompt, epoch=epoch, seed=1000 * (issued + i), deadline=0, attempt=0, holder="bare")
            for i, (prompt, epoch) in enumerate(drawn)
        ]
        issued += count
        return generator.submit(tickets, 5.0)

    def feed() -> None:
        room = 0
        while True:
            room = submit(room)

    end.send("ready")
    end.recv()
    threading.Thread(target=feed, daemon=True).start()
    latest: deque[RolloutGroup] = deque(maxlen=config.batch_groups)
    num_seated = config.generator.max_inflight // config.completions_per_prompt
    given, began, before = False, 0.0, generator.usage()
    while True:
        _, groups = generator.collect(0.0, 5.0)
        latest.extend(groups)
        if not given and len(latest) == config.batch_groups and issued > config.batch_groups + 2 * num_seated:
            end.send(list(latest))
            given = True
        if end.poll():
            if end.recv() == "end":
                break
            began, before = time.perf_counter(), generator.usage()
    # Tokens, not groups: these come in waves of as many as are in flight.
    end.send((time.perf_counter() - began) / (generator.usage().num_tokens - before.num_tokens))
    end.recv()


def _learn(end: Connection, settings: Sequence[str], folder: str, core: int) -> None:
    """Score, train and gather one batch again and again; answer with the mean seconds of each."""
    config = _settle(settings, core)
    os.environ["DS_ACCELERATOR"] = "cpu"
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # public, says its documentation

    from actors.scorer import Scorer
    from async_rlhf.run_plan import reward_and_metric
    from async_rlhf.sharding import shard_batch
    from async_rlhf.types import Batch
    from learners.engine import join_process_group
    from learners.learner import Learner

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    join_process_group(rank=0, world_size=1, address="127.0.0.1", port=store.port, timeout_s=60)
    learner = Learner(config, Path(folder))
    scorer = Scorer(config, folder, *reward_and_metric(config))
    end.send("ready")
    groups = end.recv()
    _, scored = scorer.score(groups)
    shard = shard_batch(Batch(update=0, groups=tuple(scored)), num_ranks=1, num_minibatches=config.algorithm.minibatches_per_batch)[0]
    times: list[tuple[float, float, float]] = []

    def turn() -> None:
        began = time.perf_counter()
        learner.train_step(len(times), shard)
        trained = time.perf_counter()
        for _ in learner.snapshot(len(times) + 1):
            pass
        gathered = time.perf_counter()
        scorer.score(groups)
        times.append((trained - began, gathered - trained, time.perf_counter() - gathered))

    for _ in range(WARM_UP):
        turn()
    end.send("warm")
    ends, counted = time.monotonic() + end.recv(), len(times)
    while time.monotonic() < ends or len(times) < counted + 2:
        turn()
    end.send(tuple(statistics.fmean(column) for column in zip(*times[counted:], strict=True)))
    end.recv()

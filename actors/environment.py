"""What every actor finds in its environment, beside what its node gives it."""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress

import psutil

ACTOR_ENVIRONMENT = {
    # One thread per process: two processes with two threads each are many times slower than with one (barriers spin).
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

LEARNER_NICENESS, SCORER_NICENESS = 5, 10
"""How far they give way where more processes compute than there are cores.

A step of the engine, or of a rank, is long work, and the run stands without it; scores and rewards have until the next batch. All others
(0) hardly compute, and somebody waits for what they do.
"""


def give_way(niceness: int) -> None:
    """Raise the niceness of this process, all its threads, by so much; 19 is the highest. Only root could lower it again."""
    for thread in psutil.Process().threads():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.setpriority(os.PRIO_PROCESS, thread.id, os.getpriority(os.PRIO_PROCESS, thread.id) + niceness)


@contextmanager
def exported(environment: Mapping[str, str]) -> Generator[None]:
    """Inside, what this process starts gets `environment`; this process itself has what it had again afterwards.

    So the workers of a Ray of our own have it from birth, and those that Ray starts ahead of need can be used: a runtime environment
    would make each of them anew, once Ray's agent for that is up.
    """
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

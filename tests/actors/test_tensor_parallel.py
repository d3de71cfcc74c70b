"""A generator split over two workers, each a process of its own: the same samples, and nothing left of it when it is killed."""

import os
import time
from pathlib import Path

import psutil
import pytest

from actors.generator import Generator
from actors.launch import ActorSpec
from actors.remote import kill
from tests.actors.test_vllm_generator import ask, greedy, weights_of
from tests.support.cluster import local_cluster, make_model_folder, small_config
from tests.support.samples import make_ticket

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]


WORKERS_MEMORY = ("psm_", "sem.mp-", "vllm_dist_")


def workers() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process.name().startswith("VLLM")]


def shared() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(WORKERS_MEMORY)}


def test_two_workers_sample_what_transformers_does_and_leave_nothing_behind(tmp_path: Path) -> None:
    folders = [make_model_folder(tmp_path / str(seed), seed=seed, family="qwen3", tied=True) for seed in range(2)]
    config = small_config(
        "generator.tensor_parallel_size=2",
        "generator.max_new_tokens=24",
        "generator.max_model_len=128",
        "env={VLLM_CPU_OMP_THREADS_BIND: nobind}",
    )
    before = shared()
    with local_cluster() as cluster:
        cluster.environment = {**cluster.environment, **config.env}
        spec = ActorSpec(name="generator-0.0", cls=Generator, args=(config, str(folders[0]), "generator-0.0"), max_concurrency=8)
        actor = cluster.start(spec)
        for version, folder in enumerate([folders[0], folders[1], folders[0]]):
            assert ask(actor, "install", weights_of(folder, version)).canary_error < 1e-4
            rollout = ask(actor, "evaluate", [make_ticket().prompt], 0.0)[0]
            assert rollout.completion_ids.tolist() == greedy(folder, len(rollout.completion_ids))
        assert len(workers()) == 2
        assert shared() <= before, "a killed engine would leave these behind"

        kill(actor)

        ends = time.monotonic() + 60
        while workers():
            assert time.monotonic() < ends, "the workers outlive their actor"
            time.sleep(0.1)
        assert shared() <= before

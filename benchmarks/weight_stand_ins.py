"""Who makes, installs and copies weights in their benchmark; see weights.py."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray.cloudpickle import register_pickle_by_value

from actors.canary import check_manifest, check_tensors, shapes_of_versions
from actors.generator import Generator
from async_rlhf.config import Config
from async_rlhf.types import InstallReport, WeightsManifest, WeightsVersion

register_pickle_by_value(sys.modules[__name__])  # this folder is on no path of the actors


class Policy:
    """In place of a learner rank: a model, and the learner's way of making a version of it."""

    def __init__(self, config: Config, folder: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from async_rlhf.adapters import published
        from async_rlhf.policy import CompletionScorer
        from async_rlhf.snapshot import choose_canary, score_canary
        from learners.weights import snapshot

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
        self._parts = list(published(model, config.learner.lora))
        self._canary = choose_canary(int(model.config.vocab_size))
        self._logprobs = score_canary(CompletionScorer(model), self._canary, torch.device("cpu"), "padded")
        self._dtype, self._snapshot = config.generator.dtype, snapshot

    def snapshot(self, version: int) -> Iterator[WeightsVersion]:
        """As LearnerRank.snapshot."""
        empty = WeightsManifest(version=version, tensors=(), canary_ids=self._canary, canary_logprobs=self._logprobs)
        yield from self._snapshot(self._parts, empty, dtype=self._dtype, keep=True, lent=True)

    def put(self) -> float:
        """Seconds of ray.put() of the same arrays in one object, without manifest and checksums; it is let go at once."""
        import ray

        arrays = {part.name: part.merged().detach().numpy() for part in self._parts}
        started = time.perf_counter()
        reference = ray.put(arrays)
        seconds = time.perf_counter() - started
        del reference
        return seconds


class Engine(Generator):
    """A generator that can also be asked for vLLM's own reload."""

    def reload_alone(self, *buckets: WeightsVersion) -> float:
        """Seconds of reload_weights() with a version's tensors."""
        from actors.vllm_weights import named_tensors

        weights = WeightsVersion.of(buckets)

        def reload(worker: Any) -> None:
            worker.reload_weights(weights_iterator=named_tensors(weights))

        def work(engine: Any) -> float:
            started = time.perf_counter()
            engine._engine.collective_rpc(reload)  # around everything of ours
            return time.perf_counter() - started

        return self._loop.call(work).result()


class Receiver:
    """A generator without an engine."""

    def __init__(self, config: Config, folder: str, incarnation: str) -> None:
        self._expected = shapes_of_versions(Path(folder), config.learner.lora)

    def install(self, *buckets: WeightsVersion) -> InstallReport:
        """As Generator.install, as far as the engine's load."""
        started = time.perf_counter()
        weights = WeightsVersion.of(buckets)
        check_manifest(weights.manifest, self._expected)
        check_tensors(weights)
        seconds = time.perf_counter() - started
        return InstallReport(version=weights.manifest.version, install_s=seconds, pause_s=0.0, canary_error=0.0)


class Copier:
    """One memcpy of the same bytes, in a process of its own."""

    def __init__(self) -> None:
        self._there: list[np.ndarray] = []

    def copy(self, *buckets: WeightsVersion) -> float:
        """Seconds; the fastest of three, after one that made the pages."""
        arrays = [array for bucket in buckets for array in bucket.tensors.values()]
        if [array.shape for array in self._there] != [array.shape for array in arrays]:
            self._there = [array.copy() for array in arrays]
        return min(self._once(arrays) for _ in range(3))

    def _once(self, arrays: Sequence[np.ndarray]) -> float:
        started = time.perf_counter()
        for there, array in zip(self._there, arrays, strict=True):
            np.copyto(there, array)
        return time.perf_counter() - started

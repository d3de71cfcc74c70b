"""vLLM alone in a process of its own: the other side of generator.py, and the engine whose start startup.py compares with."""

import multiprocessing
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stand_in import EOS

from async_rlhf.config import Config


def seed_of(index: int) -> int:
    """Of a prompt's completions; far enough from the next one's."""
    return 1_000_003 * (index + 1)


def engine_arguments(config: Config) -> dict[str, Any]:
    """Those that our engine has, as its user would write them; without the canary's priority."""
    return {
        "skip_tokenizer_init": True,
        "dtype": config.generator.dtype,
        "max_model_len": config.generator.max_model_len,
        "max_num_seqs": config.generator.max_inflight,
        "kv_cache_memory_bytes": config.generator.kv_cache_mib << 20,
        "block_size": 32,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 4096,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }


class Bare:
    """vLLM alone in a process of its own."""

    def __init__(self, folder: Path, config: Config, overrides: Mapping[str, Any]) -> None:
        self._here, there = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=serve_bare, args=(there, str(folder), config, dict(overrides)), daemon=True)
        self._process.start()

    def ready(self) -> None:
        """Wait until it is."""
        assert self._here.recv() == "ready"

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        """Of each group, in the order in which they ended: the time, seconds, and its completion tokens."""
        self._here.send(prompts)
        return self._here.recv()

    def close(self) -> None:
        self._here.send(None)
        self._process.join(timeout=30)
        self._process.kill()


def serve_bare(pipe: Connection, folder: str, config: Config, overrides: Mapping[str, Any]) -> None:
    """The process's main function: an engine with the arguments that ours has."""
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLMEngine.from_engine_args(EngineArgs(model=folder, **(engine_arguments(config) | dict(overrides))))
    pipe.send("ready")
    while (prompts := pipe.recv()) is not None:
        ends: list[tuple[float, int]] = []
        for index, ids in enumerate(prompts):
            parameters = SamplingParams(
                n=config.completions_per_prompt,
                temperature=1.0,
                seed=seed_of(index),
                max_tokens=config.generator.max_new_tokens,
                stop_token_ids=[EOS],
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(index), {"prompt_token_ids": ids}, parameters)
        while engine.has_unfinished_requests():
            outputs: list[Any] = engine.step()
            now = time.perf_counter()
            ends += [(now, sum(len(completion.token_ids) for completion in output.outputs)) for output in outputs]
        pipe.send(ends)

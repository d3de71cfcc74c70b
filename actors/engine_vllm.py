"""vLLM in this very process: one LLMEngine, stepped by its caller, its weights replaced between two steps (see vllm_weights).

Split over several devices, its workers are processes of their own, and the engine is still here. Importing it imports vllm (seconds).
"""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import psutil
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from actors.vllm_weights import TRANSFER, EngineUpdates, named_tensors
from async_rlhf.adapters import save_adapters, target_layers
from async_rlhf.config.lora import LoraConfig
from async_rlhf.config.schema import Config, GeneratorConfig
from async_rlhf.errors import EngineError, TransferError
from async_rlhf.policy import empty_policy
from async_rlhf.protocols import Occupancy, SampleRequest
from async_rlhf.types import FinishReason, Meeting, Rollout, VersionSpan, WeightsManifest, WeightsVersion

_CANARY = "canary"
_CANARY_PRIORITY = -1
"""Before all else."""
CANARY_SEATS = 1
"""Beside those of completions, which may all be taken."""

SHARED_MEMORY = Path("/dev/shm")

WORKERS_MEMORY = ("psm_", "sem.mp-", "vllm_dist_")
"""How the names of what vLLM's processes share begin."""

GPU_MEMORY_SHARE = 0.9
"""Of a GPU's memory: what is free on an empty one."""

MAX_STEP_TOKENS = 4096
"""Of all requests in one forward pass on the CPU; more where a single prompt may be longer."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be made ready for."""


class VLLMEngine:
    """The default engine. load() must come before the first request."""

    def __init__(self, model_folder: Path, config: Config, *, eos_token_id: int) -> None:
        """
        Args:
            model_folder: gives the architecture; its weights are read only where versions do not bring them.
            eos_token_id: ends a completion.
        """
        settings, lora = config.generator, config.learner.lora
        self._lora = lora if lora.publishes_adapters else None
        self._eos_token_id = eos_token_id
        self._max_new_tokens = settings.max_new_tokens
        self._finished: list[tuple[str, tuple[Rollout, ...]]] = []
        self._num_samples: dict[str, int] = {}
        on_cpu = not torch.cuda.is_available()
        arguments = EngineArgs(
            model=str(model_folder),
            skip_tokenizer_init=True,
            load_format="dummy" if self._lora is None else "auto",
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_inflight + CANARY_SEATS,
            max_num_active_seqs=settings.max_inflight,
            scheduling_policy="priority",  # for the canary, or an install would wait until all that waits for a seat has had one
            kv_cache_memory_bytes=settings.kv_cache_mib << 20,
            **_share_of_gpu(settings),
            block_size=32 if on_cpu else None,
            enforce_eager=settings.enforce_eager,
            **(_whole_prompts(settings) if on_cpu else {}),
            # The behavior policy is the distribution really sampled: after the temperature.
            logprobs_mode="processed_logprobs",
            worker_extension_cls="actors.vllm_weights.WeightInstaller",
            weight_transfer_config=TRANSFER,
            tensor_parallel_size=settings.tensor_parallel_size,
            distributed_executor_backend="mp" if settings.tensor_parallel_size > 1 else None,
            disable_log_stats=True,
            **({} if self._lora is None else _adapter_arguments(model_folder, self._lora)),
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._updates = EngineUpdates(self._engine, settings.tensor_parallel_size, config.weights.rereads)
        if settings.tensor_parallel_size > 1:
            forget_shared_memory()

    @property
    def num_running(self) -> int:
        """Completions admitted and not finished."""
        return sum(self._num_samples.values())

    @property
    def occupancy(self) -> Occupancy:
        """The scheduler's own counts. Asked for, because vLLM's statistics cost a Prometheus registry and time in each step."""
        num_running, num_waiting = self._scheduler.get_request_counts()
        return Occupancy(num_running=num_running, num_waiting=num_waiting, kv_use_share=self._scheduler.kv_cache_manager.usage)

    def add(self, request: SampleRequest) -> None:
        """Admit a request; vLLM samples its K completions from streams seed, seed + 1, ..."""
        parameters = SamplingParams(
            n=request.num_samples,
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=self._max_new_tokens,
            stop_token_ids=[self._eos_token_id],
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._add(request.request_id, request.prompt_ids.tolist(), parameters)
        self._num_samples[request.request_id] = request.num_samples

    def step(self) -> list[tuple[str, tuple[Rollout, ...]]]:
        """One engine step; see Engine."""
        if self._num_samples:
            self._step(None)
        finished, self._finished = self._finished, []
        return finished

    def load(self, weights: WeightsVersion) -> None:
        """Install between two steps. On any error the engine is unusable: the caller ends the actor."""
        try:
            if self._lora is None:
                self._updates.install(weights)
            else:
                self._load_adapter(weights, self._lora)
                self._updates.commit(weights.manifest.version)
        except Exception as error:
            raise EngineError(f"vLLM could not load weights version {weights.manifest.version}: {error}") from error

    def meet(self, meeting: Meeting) -> None:
        """See ReceivingEngine."""
        try:
            self._updates.meet(meeting)
        except Exception as error:
            raise TransferError(f"vLLM's workers could not meet the learner: {error}") from error

    def receive(self, manifest: WeightsManifest, noise: bool) -> None:
        """See ReceivingEngine."""
        try:
            self._updates.receive(manifest, noise)
        except Exception as error:
            raise TransferError(f"vLLM could not receive weights version {manifest.version}: {error}") from error

    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """Prompt log-probabilities of one extra request, in a seat of its own, before all that waits."""
        parameters = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        self._add(_CANARY, list(token_ids), parameters, priority=_CANARY_PRIORITY)
        logprobs = None
        self._scheduler.max_num_active_reqs += CANARY_SEATS
        while logprobs is None:
            logprobs = self._step(_CANARY)
        self._scheduler.max_num_active_reqs -= CANARY_SEATS
        return logprobs

    def close(self) -> None:
        """Free the key/value cache and the model."""
        with suppress(FileNotFoundError):  # what forget_shared_memory took away early
            self._engine.engine_core.shutdown()

    @property
    def _scheduler(self) -> Any:
        return cast(Any, self._engine.engine_core).engine_core.scheduler

    def _add(self, request_id: str, token_ids: list[int], parameters: SamplingParams, priority: int = 0) -> None:
        """Whose prompt may go by what was cached since the last install alone."""
        prompt = TokensPrompt(prompt_token_ids=token_ids, cache_salt=str(self._updates.num_installs))
        self._engine.add_request(request_id, prompt, parameters, lora_request=self._adapter(""), priority=priority)

    def _load_adapter(self, weights: WeightsVersion, lora: LoraConfig) -> None:
        """In place of the last version's. vLLM takes adapters from files; they are read at once, so a moment in memory is enough."""
        with TemporaryDirectory(prefix="async-rlhf-adapter-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
            save_adapters(dict(named_tensors(weights)), lora, Path(folder), None)
            if not self._engine.add_lora(cast(LoRARequest, self._adapter(folder))):
                raise EngineError("vLLM did not take the adapters")

    def _adapter(self, folder: str) -> LoRARequest | None:
        """The only adapter: what is in `folder`, or, without one, what was loaded last. None: versions hold all weights."""
        if self._lora is None:
            return None
        return LoRARequest(lora_name="policy", lora_int_id=1, lora_path=folder or "loaded", load_inplace=bool(folder))

    def _step(self, wanted: str | None) -> np.ndarray | None:
        """Step once; keep finished groups; return the prompt log-probabilities of request `wanted` once it is done."""
        answer = None
        outputs: list[Any] = self._engine.step()
        for output in outputs:
            if not output.finished:
                continue
            if output.request_id == wanted:
                flat = output.prompt_logprobs
                answer = np.array([flat.logprobs[flat.start_indices[i]] for i in range(1, len(flat))], dtype=np.float32)
            else:
                completions = sorted(output.outputs, key=lambda completion: completion.index)
                self._finished.append((output.request_id, tuple(self._rollout(completion) for completion in completions)))
                del self._num_samples[output.request_id]
        return answer

    def _rollout(self, completion: Any) -> Rollout:
        flat = completion.logprobs
        logprobs = np.array([flat.logprobs[start] for start in flat.start_indices], dtype=np.float32)
        spans = tuple(VersionSpan(version=int(s.version), start=s.start, end=s.end) for s in completion.weight_versions)
        reason = FinishReason.STOP if completion.finish_reason == "stop" else FinishReason.LENGTH
        token_ids = np.array(completion.token_ids, dtype=np.int32)
        return Rollout(completion_ids=token_ids, behavior_logprobs=logprobs, version_spans=spans, finish_reason=reason)


def _share_of_gpu(config: GeneratorConfig) -> dict[str, Any]:
    """On a GPU that others share vLLM would not start beside them: it looks whether the share that it is told of is free."""
    return {"gpu_memory_utilization": GPU_MEMORY_SHARE * config.num_gpus} if 0 < config.num_gpus < 1 else {}


def _whole_prompts(config: GeneratorConfig) -> dict[str, Any]:
    """No prompt is read in pieces: after a piece vLLM turns the request's random stream back, which a stream on the CPU cannot."""
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(MAX_STEP_TOKENS, config.max_model_len, config.max_inflight + CANARY_SEATS),
    }


def forget_shared_memory() -> None:
    """Take the names of the workers' shared memory away, now that all have it: the memory lives as long as they do.

    Otherwise a killed engine would leave hundreds of megabytes in /dev/shm, each time.
    """
    own = psutil.Process()
    mapped = {region.path for process in (own, *own.children(recursive=True)) for region in process.memory_maps()}
    for path in map(Path, mapped):
        if path.parent == SHARED_MEMORY and path.name.startswith(WORKERS_MEMORY):
            path.unlink(missing_ok=True)


def _adapter_arguments(model_folder: Path, lora: LoraConfig) -> dict[str, Any]:
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(rank for rank in LORA_RANKS if rank >= lora.rank),
        # By name, because vLLM would make the head ready for an adapter too, and then fails at prompt log-probabilities (the canary's)
        # while other requests run.
        "lora_target_modules": target_layers(empty_policy(model_folder), lora),
    }

"""Plain transformers as a sampling engine: slow, simple, and a reference for the fast one.

Every step runs the whole sequences through the model again: no cache that could go stale.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from async_rlhf.adapters import add_adapters
from async_rlhf.config.lora import LoraConfig
from async_rlhf.config.schema import Config
from async_rlhf.policy import load_policy
from async_rlhf.protocols import Occupancy, SampleRequest
from async_rlhf.types import FinishReason, Rollout, VersionSpan, WeightsVersion


@dataclass
class _Running:
    request: SampleRequest
    index: int
    stream: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class TransformersEngine:
    """The reference engine; see Engine for its methods."""

    def __init__(self, model_folder: Path, config: Config, *, eos_token_id: int) -> None:
        """See VLLMEngine; the weights of the folder serve until load()."""
        settings, lora = config.generator, config.learner.lora
        self._model = load_policy(model_folder, torch.float32 if settings.dtype == "float32" else torch.bfloat16).eval()
        add_adapters(self._model, lora if lora.publishes_adapters else LoraConfig(), seed=0)
        self._eos_token_id = eos_token_id
        self._max_new_tokens = settings.max_new_tokens
        self._num_slots = settings.max_inflight
        self._queue: list[_Running] = []
        self._done: dict[str, dict[int, Rollout]] = {}
        self._version = 0

    @property
    def num_running(self) -> int:
        """Completions admitted and not finished."""
        return len(self._queue)

    @property
    def occupancy(self) -> Occupancy:
        """No cache, so nothing of it is in use."""
        num_running = min(self._num_slots, len(self._queue))
        return Occupancy(num_running=num_running, num_waiting=len(self._queue) - num_running, kv_use_share=0.0)

    def add(self, request: SampleRequest) -> None:
        """Admit a request; completion k draws from a stream seeded by seed + k."""
        self._done[request.request_id] = {}
        for index in range(request.num_samples):
            stream = torch.Generator().manual_seed((request.seed + index) % 2**63)
            self._queue.append(_Running(request=request, index=index, stream=stream))

    @torch.no_grad()
    def step(self) -> list[tuple[str, tuple[Rollout, ...]]]:
        """One token for each of the first `num_slots` completions."""
        active = self._queue[: self._num_slots]
        if not active:
            return []
        rows = [[*run.request.prompt_ids.tolist(), *run.token_ids] for run in active]
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = (torch.arange(width)[None] < lengths[:, None]).long()
        logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits[torch.arange(len(rows)), lengths - 1]
        for run, row in zip(active, logits.float(), strict=True):
            temperature = run.request.temperature
            distribution = (row / temperature if temperature else row).log_softmax(-1)
            token = int(distribution.argmax() if not temperature else torch.multinomial(distribution.exp(), 1, generator=run.stream))
            run.token_ids.append(token)
            run.logprobs.append(float(distribution[token]))
            run.versions.append(self._version)
        return self._retire()

    def load(self, weights: WeightsVersion) -> None:
        """Copy the snapshot into the model."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(array) for name, array in weights.tensors.items()}
        for spec in weights.manifest.tensors:
            if spec.dtype == "bfloat16":
                tensors[spec.name] = tensors[spec.name].view(torch.bfloat16)
        self._model.load_state_dict(tensors, strict=False)
        self._model.tie_weights()
        self._version = weights.manifest.version

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """One forward pass; see Engine."""
        ids = torch.tensor([list(token_ids)])
        logprobs = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1).numpy()

    def close(self) -> None:
        """Nothing outlives the object."""

    def _retire(self) -> list[tuple[str, tuple[Rollout, ...]]]:
        finished: list[tuple[str, tuple[Rollout, ...]]] = []
        for run in [run for run in self._queue[: self._num_slots] if self._is_finished(run)]:
            self._queue.remove(run)
            request_id = run.request.request_id
            self._done[request_id][run.index] = self._rollout(run)
            if len(self._done[request_id]) == run.request.num_samples:
                completions = self._done.pop(request_id)
                finished.append((request_id, tuple(completions[index] for index in sorted(completions))))
        return finished

    def _is_finished(self, run: _Running) -> bool:
        return run.token_ids[-1] == self._eos_token_id or len(run.token_ids) == self._max_new_tokens

    def _rollout(self, run: _Running) -> Rollout:
        edges = [i for i in range(1, len(run.versions)) if run.versions[i] != run.versions[i - 1]]
        borders = [0, *edges, len(run.versions)]
        spans = tuple(VersionSpan(version=run.versions[start], start=start, end=end) for start, end in pairwise(borders))
        stopped = run.token_ids[-1] == self._eos_token_id
        return Rollout(
            completion_ids=np.array(run.token_ids, dtype=np.int32),
            behavior_logprobs=np.array(run.logprobs, dtype=np.float32),
            version_spans=spans,
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
        )

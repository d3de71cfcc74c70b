"""Bytes of logits that are in memory at the same time, counted as they are made and freed."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from async_rlhf.batching import TrainingSequence, collate
from async_rlhf.policy import CompletionScorer, load_policy

NUM_SEQUENCES = 8
MAX_LOGITS_BYTES = 4 << 20
"""Of a chunk of the head, so that small batches already have several."""


class WideTensors(TorchDispatchMode):
    """Counts the storages of every tensor whose last dimension is `width`, from its making to its end, views once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width
        self._alive: dict[int, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == self._width:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, key, None)
            self.peak_bytes = max(self.peak_bytes, sum(self._alive.values()))


def peak_logits_bytes(folder: Path, *, prompt_tokens: int, completion_tokens: int) -> tuple[int, int]:
    """Forward and backward over NUM_SEQUENCES sequences: by the learner's scorer, and by transformers' logits of every token."""
    rng = np.random.default_rng(0)
    nothing = np.zeros(completion_tokens, np.float32)
    sequences = [
        TrainingSequence(
            prompt_ids=rng.integers(3, 100, prompt_tokens, dtype=np.int32),
            completion_ids=rng.integers(3, 100, completion_tokens, dtype=np.int32),
            behavior_logprobs=nothing,
            reference_logprobs=nothing,
            score=0.0,
        )
        for _ in range(NUM_SEQUENCES)
    ]
    scorer = CompletionScorer(load_policy(folder, batching="packed"), MAX_LOGITS_BYTES)
    width = int(scorer.model.config.vocab_size)
    with WideTensors(width) as ours:
        scorer(collate([(sequence,) for sequence in sequences], "packed"), 1.0)[0].sum().backward()
    model = load_policy(folder)
    rows = collate([(sequence,) for sequence in sequences], "padded")
    with WideTensors(width) as plain:
        logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
        logits.log_softmax(-1).gather(-1, rows.input_ids[..., None]).sum().backward()
        del logits
    return ours.peak_bytes, plain.peak_bytes

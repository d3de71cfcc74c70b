"""The frozen start, asked for the log-probabilities of sampled completions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from async_rlhf.batching import Batching, TrainingSequence, collate, split_units
from async_rlhf.config import Config
from async_rlhf.policy import make_scorer, score_microbatch
from async_rlhf.types import RolloutGroup


class ReferencePolicy:
    """The reference model; on a GPU where the actor has one."""

    def __init__(self, model_folder: Path, config: Config) -> None:
        self._temperature = config.generator.temperature
        self._max_tokens = config.learner.max_tokens_per_microbatch
        self._batching: Batching = config.learner.batching
        self._device = torch.device("cuda" if config.scorer.num_gpus and torch.cuda.is_available() else "cpu")
        scorer = make_scorer(model_folder, torch.float32, self._batching, config.generator.max_model_len)
        self._scorer = scorer.eval().to(self._device)

    @torch.inference_mode()
    def logprobs(self, groups: Sequence[RolloutGroup]) -> list[np.ndarray]:
        """Per completion, groups in order: [T] float32 log-probability of each token, at the sampling temperature."""
        units = [
            (
                TrainingSequence(
                    prompt_ids=group.ticket.prompt.token_ids,
                    completion_ids=rollout.completion_ids,
                    behavior_logprobs=rollout.behavior_logprobs,
                    reference_logprobs=rollout.behavior_logprobs,
                    score=0.0,
                ),
            )
            for group in groups
            for rollout in group.rollouts
        ]
        results: dict[int, np.ndarray] = {}
        for share in split_units(units, self._max_tokens, self._batching):
            microbatch = collate([units[index] for index in share], self._batching)
            values, _ = score_microbatch(self._scorer, microbatch, self._temperature, self._device)
            for index, row in zip(share, values.cpu().numpy(), strict=True):
                results[index] = row[: len(units[index][0].completion_ids)]
        return [results[index] for index in range(len(units))]

"""Log-probabilities of completion tokens under a causal language model."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from async_rlhf.batching import Microbatch


class CompletionScorer(nn.Module):
    """A causal language model that answers with log-probabilities instead of logits.

    The head is applied to completion positions only: no [N, L, V] logits of the prompts are ever made.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, completion_positions: Tensor, completion_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            input_ids: [N, L]. attention_mask: [N, L]. completion_positions, completion_ids: [N, T]; see Microbatch.
            temperature: logits are divided by it first, as the sampler does.
        Returns:
            [N, T] log-probability of each completion token in nats (float32, carries the gradient; meaningless where masked),
            [N, T] entropy of the distribution it was drawn from, in nats, without gradient.
        """
        backbone = cast(Any, self.model.base_model)
        hidden: Tensor = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        index = completion_positions[:, :, None].expand(-1, -1, hidden.shape[-1])
        logits = cast(nn.Module, self.model.get_output_embeddings())(hidden.gather(1, index)).float() / temperature
        log_distribution = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_distribution.exp() * log_distribution).sum(-1)
        return log_distribution.gather(-1, completion_ids[:, :, None]).squeeze(-1), entropy


def load_policy(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal language model of a Hugging Face folder, in `dtype`."""
    logging.disable_progress_bar()
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True))


def score_microbatch(scorer: nn.Module, microbatch: Microbatch, temperature: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N, T] of a microbatch's completions under `scorer` (a CompletionScorer, wrapped or not)."""
    return cast(
        tuple[Tensor, Tensor],
        scorer(
            microbatch.input_ids.to(device),
            microbatch.attention_mask.to(device),
            microbatch.completion_positions.to(device),
            microbatch.completion_ids.to(device),
            temperature,
        ),
    )

"""What one trains by hand, without a framework: made-up batches, models of a given size, and a plain torch loop over them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from async_rlhf.backbone import completion_states
from async_rlhf.batching import Microbatch, collate, sequence_of, split_units
from async_rlhf.config import Config
from async_rlhf.policy import load_policy
from async_rlhf.types import Batch, FinishReason, Prompt, Rollout, RolloutGroup, ScoredGroup, Ticket, VersionSpan

VOCAB_SIZE = 2048
MAX_POSITIONS = 1024
SIZES = {"1M": (128, 4, 384), "10M": (320, 7, 864), "50M": (640, 9, 1728)}
"""Name -> hidden size, layers, intermediate size."""
HEAD_WIDTH = 32


def make_model(folder: Path, size: str) -> Path:
    """A Llama with random weights, as a Hugging Face folder."""
    hidden_size, num_layers, intermediate_size = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_WIDTH,
        intermediate_size=intermediate_size,
        max_position_embeddings=MAX_POSITIONS,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / size)
    return folder / size


def make_batch(num_groups: int, *, median: float, sigma: float, max_tokens: int, prompt_tokens: int, num_completions: int = 4) -> Batch:
    """Groups of random tokens: log-normal completions (sigma 0: all of one length), prompts of about one length, made-up scores."""
    rng = np.random.default_rng(0)
    groups = [
        _make_group(rng, index, np.exp(rng.normal(math.log(median), sigma, num_completions)).clip(1, max_tokens), prompt_tokens)
        for index in range(num_groups)
    ]
    return Batch(update=0, groups=tuple(groups))


def _make_group(rng: np.random.Generator, index: int, lengths: np.ndarray, prompt_tokens: int) -> ScoredGroup:
    def tokens(count: int) -> np.ndarray:
        return rng.integers(3, VOCAB_SIZE, count, dtype=np.int32)

    def logprobs(count: int) -> np.ndarray:
        # About what a policy with random weights says.
        return (-math.log(VOCAB_SIZE) + 0.05 * rng.standard_normal(count)).astype(np.float32)

    prompt = Prompt(prompt_id=str(index), text="", token_ids=tokens(int(rng.integers(prompt_tokens // 2, 2 * prompt_tokens))))
    counts = [round(length) for length in lengths]
    rollouts = tuple(
        Rollout(
            completion_ids=tokens(count),
            behavior_logprobs=logprobs(count),
            version_spans=(VersionSpan(version=0, start=0, end=count),),
            finish_reason=FinishReason.STOP,
        )
        for count in counts
    )
    ticket = Ticket(ticket_id=index, prompt=prompt, epoch=0, seed=index, deadline=1, attempt=0, holder="generator-0.0")
    return ScoredGroup(
        group=RolloutGroup(ticket=ticket, rollouts=rollouts),
        scores=rng.standard_normal(len(counts)).astype(np.float32),
        reference_logprobs=tuple(logprobs(count) for count in counts),
        completions=("",) * len(counts),
    )


def collated(groups: Sequence[ScoredGroup], config: Config) -> list[Microbatch]:
    """The microbatches that the learner makes of a rank's groups."""
    units = [tuple(sequence_of(scored, index) for index in range(len(scored.scores))) for scored in groups]
    shares = split_units(units, config.learner.max_tokens_per_microbatch, "packed")
    return [collate([units[index] for index in share], "packed") for share in shares]


class BareLoop:
    """Forward, loss, backward, clip, step."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._model = load_policy(folder, batching="packed")
        self._head = cast(nn.Linear, self._model.get_output_embeddings())
        self._settings, self._algorithm = config.learner, config.algorithm
        betas = (self._settings.adam_beta1, self._settings.adam_beta2)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=self._settings.learning_rate, betas=betas, weight_decay=self._settings.weight_decay, fused=True
        )

    def step(self, microbatches: Sequence[Microbatch], num_completions: int) -> tuple[float, float]:
        """One optimizer step; returns the loss, of this rank's share, and the gradient norm."""
        total = 0.0
        for microbatch in microbatches:
            loss = self._loss(self._logprobs(microbatch), microbatch) / num_completions
            loss.backward()
            total += loss.item()
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        if dist.get_world_size() > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total, norm.item()

    def _logprobs(self, microbatch: Microbatch) -> Tensor:
        """[N, T] of the completion tokens; logits of these positions alone."""
        logits = self._head(completion_states(self._model, microbatch))
        flat = -cross_entropy(logits, microbatch.completion_ids[microbatch.loss_mask], reduction="none")
        return flat.new_zeros(microbatch.loss_mask.shape).masked_scatter(microbatch.loss_mask, flat)

    def _loss(self, logprobs: Tensor, microbatch: Microbatch) -> Tensor:
        """RLOO with truncated importance weights, one ratio per completion, summed over the completions."""
        settings, cap = self._algorithm.rloo, self._algorithm.correction_cap
        with torch.no_grad():
            penalty = settings.kl_coef * (logprobs - microbatch.reference_logprobs).sum(-1)
            returns = (microbatch.scores - penalty).view(-1, microbatch.unit_size)
            siblings = (returns.sum(1, keepdim=True) - returns) / (microbatch.unit_size - 1)
            advantages = (returns - siblings).flatten()
            weights = (logprobs - microbatch.behavior_logprobs).sum(-1).exp().clamp(max=cap)
        ratio = (logprobs - logprobs.detach()).sum(-1).exp()
        clipped = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
        return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()

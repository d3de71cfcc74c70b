"""What a network says of completion tokens: their log-probabilities under a policy, their values under a critic."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from async_rlhf.backbone import ATTENTION, check_backbone, check_head, completion_states, soft_capped, softcap_of
from async_rlhf.batching import Batching, Microbatch
from async_rlhf.errors import ConfigError

MAX_LOGITS_BYTES = 256 << 20
"""Size of one chunk's logits in float32; more completion tokens go through the head in several, recomputed in the backward pass."""

VALUE_HEAD = "score.weight"
"""What a critic has and a policy has not."""

Score = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""Hidden states, token ids and temperature to log-probabilities and entropies."""


class CompletionScorer(nn.Module):
    """A causal language model that answers with log-probabilities instead of logits; it takes the model over.

    The head is applied to completion positions only, in chunks: neither logits of the prompts nor all of the completions'
    are ever in memory.
    """

    def __init__(self, model: PreTrainedModel, max_logits_bytes: int = MAX_LOGITS_BYTES) -> None:
        super().__init__()
        self.model = model
        self._chunk_tokens = max(1, max_logits_bytes // (4 * int(model.config.vocab_size)))
        # All chunks inside one call of the head: under ZeRO-3 every call is a collective, and ranks differ in their chunks.
        head = cast(nn.Linear, model.get_output_embeddings())
        cast(Any, head).forward = partial(_score_in_chunks, partial(_score_tokens, head, softcap_of(model)))

    def forward(self, microbatch: Microbatch, temperature: float) -> tuple[Tensor, Tensor]:
        """
        Args:
            microbatch: on the model's device, batched as the model was loaded for.
            temperature: logits are divided by it first, as the sampler does.
        Returns:
            [N, T] log-probability of each completion token in nats (float32, carries the gradient; 0 where masked),
            [N, T] entropy of the distribution it was drawn from, in nats, without gradient; 0 where masked.
        """
        hidden, ids = completion_states(self.model, microbatch), microbatch.completion_ids[microbatch.loss_mask]
        logprobs, entropy = cast(Any, self.model.get_output_embeddings())(hidden, ids, temperature, self._chunk_tokens)
        return _in_place(logprobs, microbatch.loss_mask), _in_place(entropy, microbatch.loss_mask)


class ValueScorer(nn.Module):
    """A critic: a backbone with one number per position (a sequence-classification model with one label)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, microbatch: Microbatch) -> tuple[Tensor]:
        """[N, T] value of the state before each completion token (float32, carries the gradient; 0 where masked)."""
        hidden = completion_states(self.model, microbatch)
        return (_in_place(cast(Any, self.model).score(hidden).float().squeeze(-1), microbatch.loss_mask),)


def make_scorer(folder: Path, dtype: torch.dtype, batching: Batching, max_model_len: int) -> CompletionScorer:
    """The policy of a Hugging Face folder, proven to score as its own logits do.

    Args:
        max_model_len: tokens of the longest sequence that it will see.
    Raises:
        ConfigError: the folder, or the architecture with this batching, does not do.
    """
    model = load_policy(folder, dtype, batching)
    check_backbone(model, batching, max_model_len)
    check_head(model, batching)
    return CompletionScorer(model)


def make_value_scorer(folder: Path, dtype: torch.dtype, batching: Batching, max_model_len: int) -> ValueScorer:
    """The critic of a Hugging Face folder; see make_scorer."""
    model = load_critic(folder, dtype, batching)
    check_backbone(model, batching, max_model_len)
    return ValueScorer(model)


def load_policy(folder: Path, dtype: torch.dtype = torch.float32, batching: Batching = "padded") -> PreTrainedModel:
    """The causal language model of a Hugging Face folder, in `dtype`, for microbatches of this batching.

    Raises:
        ConfigError: weights are missing in the folder.
    """
    model, missing = _load(AutoModelForCausalLM, folder, dtype, batching)
    _refuse_missing(folder, missing)
    return model


def empty_policy(folder: Path) -> PreTrainedModel:
    """The architecture of a Hugging Face folder, without memory for its weights."""
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False)))


def load_critic(folder: Path, dtype: torch.dtype = torch.float32, batching: Batching = "padded") -> PreTrainedModel:
    """The critic of a Hugging Face folder: a reward model or critic as it is, or a policy with a value head of zeros.

    Raises:
        ConfigError: weights are missing in the folder, or there is no critic of this architecture.
    """
    try:
        model, missing = _load(AutoModelForSequenceClassification, folder, dtype, batching, num_labels=1)
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"no critic can be made of {folder}: {why}; choose an algorithm without one, for instance rloo") from None
    _refuse_missing(folder, missing - {VALUE_HEAD})
    if VALUE_HEAD in missing:
        nn.init.zeros_(cast(Any, model).score.weight)
    return model


def score_microbatch(scorer: nn.Module, microbatch: Microbatch, temperature: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N, T] of a microbatch's completions under `scorer` (a CompletionScorer, wrapped or not)."""
    return cast(tuple[Tensor, Tensor], scorer(microbatch.to(device), temperature))


def _load(auto: Any, folder: Path, dtype: torch.dtype, batching: Batching, **settings: int) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of parameters that the folder lacks: transformers fills them with random numbers."""
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would say of missing weights, the caller says
    try:
        model, found = auto.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION[batching],
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    finally:
        logging.set_verbosity(verbosity)
    return cast(PreTrainedModel, model), set(cast(list[str], found["missing_keys"]))


def _refuse_missing(folder: Path, missing: set[str]) -> None:
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of the model's weights, for instance {min(missing)}; they would be random numbers: save the "
            "whole model with save_pretrained"
        )


def _score_in_chunks(score: Score, hidden: Tensor, ids: Tensor, temperature: float, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """[M] log-probability and entropy of M tokens from the states [M, H] before them; `head.forward`."""
    if len(ids) <= chunk_tokens:
        return score(hidden, ids, temperature)
    chunks = [
        cast(tuple[Tensor, Tensor], checkpoint(score, *chunk, temperature, use_reentrant=False, preserve_rng_state=False))
        for chunk in zip(hidden.split(chunk_tokens), ids.split(chunk_tokens), strict=True)
    ]
    logprobs, entropy = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _score_tokens(head: nn.Linear, softcap: float | None, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = soft_capped(linear(hidden, head.weight, head.bias), softcap).float()
    return cast(tuple[Tensor, Tensor], _TokenScores.apply(logits if temperature == 1.0 else logits / temperature, ids))


class _TokenScores(torch.autograd.Function):
    """Logits [M, V] and ids [M] to log-probabilities [M], and entropies [M] without gradient.

    The distribution is computed once, for the entropy and for the gradient: d logprob / d logits = one-hot(id) - distribution.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        log_distribution = logits.log_softmax(-1)
        logprobs = log_distribution.gather(-1, ids[:, None]).squeeze(-1)
        distribution = log_distribution.exp()
        entropy = -log_distribution.mul_(distribution).sum(-1)
        ctx.save_for_backward(distribution, ids)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        distribution, ids = ctx.saved_tensors
        # In place, which autograd notices: a second backward through the same graph is refused.
        of_logits = distribution.mul_(-grad_outputs[0][:, None])
        return of_logits.scatter_add_(-1, ids[:, None], grad_outputs[0][:, None]), None


def _in_place(values: Tensor, loss_mask: Tensor) -> Tensor:
    """[N, T] with the M values where the mask is true, row by row, and 0 elsewhere."""
    return values.new_zeros(loss_mask.shape).masked_scatter(loss_mask, values)

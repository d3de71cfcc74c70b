"""What a network says of completion tokens: their log-probabilities under a policy, their values under a critic."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from async_rlhf.batching import Batching, Microbatch
from async_rlhf.packing import packed_attention

ATTENTION = {"packed": "packed_causal", "padded": "sdpa"}
"""The name, within transformers, of the attention that each kind of batching needs."""

MAX_LOGITS_BYTES = 256 << 20
"""Logits in memory at once; more completion tokens than fit go through the head in chunks, recomputed in the backward pass."""


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
        cast(Any, head).forward = partial(_score_in_chunks, head)

    def forward(self, microbatch: Microbatch, temperature: float) -> tuple[Tensor, Tensor]:
        """
        Args:
            microbatch: on the model's device, batched as the model was loaded for.
            temperature: logits are divided by it first, as the sampler does.
        Returns:
            [N, T] log-probability of each completion token in nats (float32, carries the gradient; 0 where masked),
            [N, T] entropy of the distribution it was drawn from, in nats, without gradient; 0 where masked.
        """
        hidden, ids = _completion_states(self.model, microbatch), microbatch.completion_ids[microbatch.loss_mask]
        logprobs, entropy = cast(Any, self.model.get_output_embeddings())(hidden, ids, temperature, self._chunk_tokens)
        return _in_place(logprobs, microbatch.loss_mask), _in_place(entropy, microbatch.loss_mask)


class ValueScorer(nn.Module):
    """A critic: a backbone with one number per position (a sequence-classification model with one label)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, microbatch: Microbatch) -> tuple[Tensor]:
        """[N, T] value of the state before each completion token (float32, carries the gradient; 0 where masked)."""
        hidden = _completion_states(self.model, microbatch)
        return (_in_place(cast(Any, self.model).score(hidden).float().squeeze(-1), microbatch.loss_mask),)


def load_policy(folder: Path, dtype: torch.dtype = torch.float32, batching: Batching = "padded") -> PreTrainedModel:
    """The causal language model of a Hugging Face folder, in `dtype`, for microbatches of this batching."""
    return _load(AutoModelForCausalLM, folder, dtype, batching)


def load_critic(folder: Path, dtype: torch.dtype = torch.float32, batching: Batching = "padded") -> PreTrainedModel:
    """The critic of a Hugging Face folder: a reward model or critic as it is, or a policy with a value head of zeros."""
    model = _load(AutoModelForSequenceClassification, folder, dtype, batching, num_labels=1)
    if not has_value_head(folder):
        nn.init.zeros_(cast(Any, model).score.weight)
    return model


def has_value_head(folder: Path) -> bool:
    """The folder holds a sequence-classification model, not a language model."""
    from transformers import AutoConfig

    names = cast(list[str], AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures or [])
    return any(name.endswith("ForSequenceClassification") for name in names)


def score_microbatch(scorer: nn.Module, microbatch: Microbatch, temperature: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N, T] of a microbatch's completions under `scorer` (a CompletionScorer, wrapped or not)."""
    return cast(tuple[Tensor, Tensor], scorer(microbatch.to(device), temperature))


def _load(auto: Any, folder: Path, dtype: torch.dtype, batching: Batching, **settings: int) -> PreTrainedModel:
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a policy has no value head, and load_critic knows
    try:
        return cast(
            PreTrainedModel,
            auto.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=ATTENTION[batching],
                trust_remote_code=False,
                use_safetensors=True,
                **settings,
            ),
        )
    finally:
        logging.set_verbosity(verbosity)


def _completion_states(model: PreTrainedModel, microbatch: Microbatch) -> Tensor:
    """[M, H] last hidden state before each of the M completion tokens, row by row."""
    packed = {} if microbatch.layout is None else {"packed_layout": microbatch.layout}
    hidden: Tensor = (
        cast(Any, model.base_model)(
            input_ids=microbatch.input_ids,
            position_ids=microbatch.position_ids,
            attention_mask=microbatch.attention_mask,
            use_cache=False,
            **packed,
        )
    ).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, microbatch.predicted_from[microbatch.loss_mask])


def _score_in_chunks(head: nn.Linear, hidden: Tensor, ids: Tensor, temperature: float, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """[M] log-probability and entropy of M tokens from the states [M, H] before them; `head.forward`."""
    if len(ids) <= chunk_tokens:
        return _score_tokens(head, hidden, ids, temperature)
    chunks = [
        cast(tuple[Tensor, Tensor], checkpoint(_score_tokens, head, *chunk, temperature, use_reentrant=False))
        for chunk in zip(hidden.split(chunk_tokens), ids.split(chunk_tokens), strict=True)
    ]
    logprobs, entropy = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _score_tokens(head: nn.Linear, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_distribution = (linear(hidden, head.weight, head.bias).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_distribution.exp() * log_distribution).sum(-1)
    return log_distribution.gather(-1, ids[:, None]).squeeze(-1), entropy


def _in_place(values: Tensor, loss_mask: Tensor) -> Tensor:
    """[N, T] with the M values where the mask is true, row by row, and 0 elsewhere."""
    return values.new_zeros(loss_mask.shape).masked_scatter(loss_mask, values)


def _packed_causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, L, D] in, [1, L, H, D] out."""
    layout = settings.get("packed_layout")
    assert layout is not None and attention_mask is None, "a model loaded for packed batching got a padded microbatch"
    ignored = [name for name in ("softcap", "s_aux", "position_bias") if settings.get(name) is not None]
    assert not ignored, f"packed attention does not know this model's {', '.join(ignored)}; set learner.batching=padded"
    window = settings.get("sliding_window")
    assert window is None or layout.longest <= window, (
        f"a sequence of {layout.longest} tokens exceeds the model's sliding window of {window}; set learner.batching=padded"
    )
    return packed_attention(query[0], key[0], value[0], layout, settings.get("scaling"))[None], None


AttentionInterface.register(ATTENTION["packed"], _packed_causal)

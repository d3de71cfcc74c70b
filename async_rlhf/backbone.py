"""The network below the head: its states before completion tokens, its attention in packed batches, and proof of both.

An architecture is asked once, before any training, whether it computes in our microbatches what it computes by itself: packed
sequences must not see one another (convolutions and recurrent layers would mix them), attention must be the model's own
(soft-capped scores, sinks and windows are not ours), and log-probabilities must be those of its own logits.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from async_rlhf.batching import Batching, Microbatch, collate, text_sequence
from async_rlhf.errors import ConfigError
from async_rlhf.packing import packed_attention

ATTENTION = {"packed": "packed_causal", "padded": "sdpa"}
"""The name, within transformers, of the attention that each kind of batching needs."""

NUM_TOKENS = (7, 12)
"""Lengths of the two texts."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of the largest entry; sequences that mix, or capped attention, are off by far more than rounding."""


def completion_states(model: PreTrainedModel, microbatch: Microbatch) -> Tensor:
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


@torch.no_grad()
def check_backbone(model: PreTrainedModel, batching: Batching, max_model_len: int) -> None:
    """Compare the states of two texts in one microbatch with those of each alone under transformers' plain attention.

    Raises:
        ConfigError: they differ, or the model's attention window is shorter than `max_model_len` and packing ignores it.
    """
    name, remedy = type(model).__name__, "set learner.batching=padded" if batching == "packed" else "this architecture is not supported"
    window = getattr(model.config, "sliding_window", None)
    if batching == "packed" and window is not None and window < max_model_len:
        raise ConfigError(f"{name} attends to {window} tokens, fewer than generator.max_model_len ({max_model_len}), when packed; {remedy}")
    texts = _texts(model)
    try:
        model.set_attn_implementation("eager")
        alone = [cast(Any, model.base_model)(input_ids=ids, use_cache=False).last_hidden_state[0, :-1] for ids in texts]
        model.set_attn_implementation(ATTENTION[batching])
        together = completion_states(model, collate([(text_sequence(ids[0].tolist()),) for ids in texts], batching).to(model.device))
    except (KeyError, AttributeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{name} does not take the attention of {batching} batches ({type(error).__name__}: {error}); {remedy}") from None
    if not _equal(together, torch.cat(alone)):
        raise ConfigError(f"{name} computes other states for two texts in one {batching} batch than for each alone; {remedy}")


@torch.no_grad()
def check_head(model: PreTrainedModel, batching: Batching) -> None:
    """Compare the head's own output, softly capped where the model says so, with the model's logits.

    Raises:
        ConfigError: the model does something to its logits after the head.
    """
    ids, name = _texts(model)[0], type(model).__name__
    model.set_attn_implementation("eager")
    states = cast(Any, model.base_model)(input_ids=ids, use_cache=False).last_hidden_state
    logits = cast(Any, model)(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(ATTENTION[batching])
    if not _equal(soft_capped(cast(Any, model.get_output_embeddings())(states), softcap_of(model)), logits):
        raise ConfigError(f"{name} changes its logits after the head (scales), which is not supported; choose another model")


def softcap_of(model: PreTrainedModel) -> float | None:
    """The bound that an architecture puts on its logits; None: there is none."""
    return getattr(model.config, "final_logit_softcapping", None)


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), as Gemma does."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _texts(model: PreTrainedModel) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    vocab_size = int(model.config.vocab_size)
    return [torch.randint(0, vocab_size, (1, count), generator=source).to(model.device) for count in NUM_TOKENS]


def _equal(got: Tensor, expected: Tensor) -> bool:
    scale = float(expected.float().abs().max())
    return float((got.float() - expected.float()).abs().max()) <= TOLERANCE[expected.dtype] * scale


def _packed_causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, L, D] in, [1, L, H, D] out."""
    layout = settings.get("packed_layout")
    assert layout is not None and attention_mask is None, "a model loaded for packed batching got a padded microbatch"
    unknown = [name for name in ("softcap", "s_aux", "position_bias", "sliding_window") if settings.get(name) is not None]
    assert unknown in ([], ["sliding_window"]), f"packed attention does not know {', '.join(unknown)}; check_backbone would have refused it"
    return packed_attention(query[0], key[0], value[0], layout, settings.get("scaling"))[None], None


AttentionInterface.register(ATTENTION["packed"], _packed_causal)

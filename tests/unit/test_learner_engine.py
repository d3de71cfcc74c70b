"""What the learner does to its gradients and layers beside DeepSpeed. (Importing the module imports deepspeed: seconds.)"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from async_rlhf.batching import collate, text_sequence
from async_rlhf.errors import ConfigError
from async_rlhf.policy import CompletionScorer
from learners.engine import checkpoint_activations, clip_gradients
from tests.support.tiny_policy import tiny_policy


def engine_with(*gradients: list[float], zero: bool = False) -> SimpleNamespace:
    """An engine after a backward that gave its parameters these gradients; a last one got none."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients] + [nn.Parameter(torch.zeros(1))])
    for parameter, gradient in zip(module, gradients, strict=False):
        parameter.grad = torch.tensor(gradient)
    return SimpleNamespace(module=module, zero_optimization=lambda: zero)


def gradients_of(engine: SimpleNamespace) -> list[list[float]]:
    return [parameter.grad.tolist() for parameter in engine.module if parameter.grad is not None]


def test_a_long_gradient_is_scaled_to_the_limit_and_its_norm_is_that_of_before():
    """|(3, 0), (4)| = 5, at most 1: a fifth of each."""
    engine = engine_with([3.0, 0.0], [4.0])

    assert clip_gradients(engine, 1.0) == pytest.approx(5.0)
    assert gradients_of(engine) == [pytest.approx([0.6, 0.0]), pytest.approx([0.8])]


def test_a_short_gradient_stays_as_it_is_to_the_last_bit():
    engine = engine_with([0.3, 0.0], [0.4])

    assert clip_gradients(engine, 1.0) == pytest.approx(0.5)
    assert gradients_of(engine) == [torch.tensor([0.3, 0.0]).tolist(), torch.tensor([0.4]).tolist()]


def test_a_gradient_that_is_not_finite_has_a_norm_that_says_so():
    assert not torch.tensor(clip_gradients(engine_with([float("nan")]), 1.0)).isfinite()


def test_where_deepspeed_shards_it_clips():
    engine = engine_with([30.0], zero=True)

    assert clip_gradients(engine, 1.0) is None
    assert gradients_of(engine) == [[30.0]]


def backward(checkpointed: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a pack's log-probabilities, and bytes kept for the backward pass."""
    model = tiny_policy()
    scorer = CompletionScorer(model)
    model.set_attn_implementation("packed_causal")
    if checkpointed:
        checkpoint_activations(scorer)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    microbatch = collate([(text_sequence(list(range(3, 3 + length))),) for length in (9, 17, 12)], "packed")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = scorer(microbatch, 1.0)
    logprobs.sum().backward()
    return {name: parameter.grad for name, parameter in scorer.named_parameters() if parameter.grad is not None}, sum(kept.values())


def test_checkpointed_layers_give_the_same_gradients_from_less_memory():
    plain, of_plain = backward(False)
    again, of_again = backward(True)

    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)
    assert of_again < 0.6 * of_plain


def test_checkpointing_does_not_bring_dropout_back():
    model = tiny_policy()
    checkpoint_activations(model)

    assert not any(module.training for module in model.modules())


def test_a_model_without_layers_to_checkpoint_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"Linear has no layers to checkpoint; set learner\.activation_checkpointing=false"):
        checkpoint_activations(nn.Linear(2, 2))

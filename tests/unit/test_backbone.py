"""An architecture that would score wrongly in our microbatches is refused when it is loaded, by name and with a remedy."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from async_rlhf.batching import Batching, text_microbatch
from async_rlhf.errors import ConfigError
from async_rlhf.policy import CompletionScorer, load_policy, make_scorer, make_value_scorer, score_microbatch
from tests.support.tiny_policy import with_character

SIZES = {"vocab_size": 22, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GATED, sliding_window=16)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GATED, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GATED, head_dim=8, sliding_window=16)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=22, hidden_size=32, n_layer=2, n_head=4)),
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**GATED, layer_types=["conv", "full_attention"])),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GATED, head_dim=8, attn_logit_softcapping=0.05, final_logit_softcapping=None)),
    "gemma2, final cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GATED, head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=0.05)
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**GATED, logits_scaling=4.0)),
}


def saved(name: str, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = with_character(MODELS[name]().eval())
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-neox", "gemma", "gemma3"])
def test_models_of_plain_attention_are_accepted_as_policy_and_critic(name: str, batching: Batching, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)

    assert make_scorer(folder, torch.float32, batching, 16).model.config.model_type.startswith(name[:3])
    assert make_scorer(folder, torch.bfloat16, batching, 16).model.dtype == torch.bfloat16
    assert make_value_scorer(folder, torch.float32, batching, 16).model.config.num_labels == 1


@pytest.mark.parametrize(
    ("name", "batching", "message"),
    [
        # Convolutions run over the whole pack; transformers' own flag says that this architecture takes any attention.
        ("lfm2", "packed", r"Lfm2ForCausalLM computes other states for two texts.*set learner\.batching=padded"),
        ("bloom", "packed", r"BloomForCausalLM .*set learner\.batching=padded"),
        ("gemma2", "packed", r"Gemma2ForCausalLM .*softcap.*set learner\.batching=padded"),
        ("gemma2", "padded", r"Gemma2ForCausalLM computes other states.*this architecture is not supported"),
        ("granite", "padded", r"GraniteForCausalLM changes its logits after the head"),
    ],
)
def test_models_that_would_score_wrongly_are_refused(name: str, batching: Batching, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scorer(saved(name, tmp_path), torch.float32, batching, 16)


def test_convolutions_are_fine_in_padded_batches(tmp_path: Path) -> None:
    assert make_scorer(saved("lfm2", tmp_path), torch.float32, "padded", 16)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 4 * 22 * 3])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_logits_that_the_architecture_caps_are_capped_in_every_chunk(batching: Batching, chunk_bytes: int, tmp_path: Path) -> None:
    """The cap of 0.05 flattens a distribution that is far from uniform without it."""
    folder = saved("gemma2, final cap", tmp_path)
    plain = load_policy(folder)
    scorer = CompletionScorer(load_policy(folder, batching=batching), max_logits_bytes=chunk_bytes)
    ids = (3, 9, 14, 4, 20, 7, 11, 5)

    with torch.no_grad():
        expected = (plain(input_ids=torch.tensor([ids])).logits[0, :-1] / 0.7).log_softmax(-1)
        got, entropy = score_microbatch(scorer, text_microbatch(ids, batching), 0.7, torch.device("cpu"))

    torch.testing.assert_close(got[0], expected.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy[0], -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=0)
    assert float(entropy.min()) > 0.999 * math.log(22) > 1.01 * float(uncapped_entropy(plain, ids).min())


def uncapped_entropy(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    model.config.final_logit_softcapping = None
    with torch.no_grad():
        distribution = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -(distribution.exp() * distribution).sum(-1)


def test_an_attention_window_shorter_than_the_longest_sequence_is_refused_in_packs_alone(tmp_path: Path) -> None:
    folder = saved("mistral", tmp_path)

    with pytest.raises(ConfigError, match=r"attends to 16 tokens, fewer than generator.max_model_len \(17\), when packed"):
        make_scorer(folder, torch.float32, "packed", 17)
    assert make_scorer(folder, torch.float32, "padded", 17)


@pytest.mark.parametrize("make", [make_scorer, make_value_scorer])
def test_a_folder_that_lacks_weights_is_refused_by_the_name_of_one(make: Callable[..., object], tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(ConfigError, match=r"lacks 1 of the model's weights, for instance model\.layers\.1\.mlp\.up_proj\.weight"):
        make(folder, torch.float32, "packed", 16)


def test_an_architecture_without_a_critic_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no critic can be made of .*choose an algorithm without one"):
        make_value_scorer(saved("granite", tmp_path), torch.float32, "padded", 16)

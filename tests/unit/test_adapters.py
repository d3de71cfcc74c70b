"""Low-rank adapters: what they compute, what leaves merged, and what PEFT reads of them."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from async_rlhf.adapters import add_adapters, plain_parts, save_adapters, trained_parameters
from async_rlhf.config.lora import LoraConfig
from async_rlhf.config.schema import ModelConfig
from async_rlhf.errors import ConfigError
from async_rlhf.tasks.start import build_policy, build_tokenizer
from tests.support.tiny_policy import with_character

IDS = torch.tensor([[3, 9, 14, 4, 20, 7]])
LORA = LoraConfig(rank=4, alpha=10.0)
FAMILIES = ["llama", "qwen3", "gpt_neox", "gemma", "gemma3"]


def plain_model(family: str = "llama", tied: bool = False) -> PreTrainedModel:
    config = ModelConfig(family=family, tie_embeddings=tied, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)  # type: ignore[arg-type]
    return with_character(build_policy(config, build_tokenizer(), seed=1)).eval()


def trained_model(family: str = "llama", tied: bool = False, settings: LoraConfig = LORA) -> PreTrainedModel:
    """With adapters that have moved far from zero."""
    model = plain_model(family, tied)
    add_adapters(model, settings, seed=2)
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in trained_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing_so_that_the_base_is_the_reference(family: str) -> None:
    model = plain_model(family)
    before = logits(model)

    add_adapters(model, LORA, seed=0)

    assert torch.equal(logits(model), before)


def test_rank_0_leaves_every_weight_to_be_trained() -> None:
    model = plain_model()
    names = [name for name, _ in model.named_parameters()]

    add_adapters(model, LoraConfig(), seed=0)

    assert [name for name, _ in trained_parameters(model)] == [part.name for part in plain_parts(model)] == names


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_weights_compute_in_the_plain_model_what_the_adapters_compute(family: str, tied: bool) -> None:
    model, plain = trained_model(family, tied), plain_model(family, tied)
    before = logits(plain)

    merged = {part.name: part.merged() for part in plain_parts(model)}

    assert merged.keys() == dict(plain.named_parameters()).keys()
    assert list(merged) == [name for name, _ in plain.named_parameters()], "in layer order, as weights travel"
    plain.load_state_dict(merged, strict=False)
    plain.tie_weights()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=0)
    assert float((logits(plain) - before).abs().max()) > 0.1


def test_merging_is_base_plus_alpha_over_rank_times_b_a_and_leaves_the_base_as_it_was() -> None:
    """alpha 10, rank 4: scale 2.5."""
    model, base = trained_model(), dict(plain_model().named_parameters())
    name = "model.layers.1.mlp.up_proj"

    for _ in range(50):
        merged = {part.name: part.merged().detach().clone() for part in plain_parts(model)}

    layer = model.get_submodule(name)
    expected = base[f"{name}.weight"] + 2.5 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(layer.base_layer.weight, base[f"{name}.weight"])
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"]) and torch.equal(
        merged["model.norm.weight"], base["model.norm.weight"]
    )


def test_gradients_reach_the_adapters_alone() -> None:
    model = trained_model("gpt_neox")

    model(input_ids=IDS).logits.square().mean().backward()

    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == dict(trained_parameters(model)).keys()
    assert all(float(parameter.grad.abs().max()) > 0 for _, parameter in trained_parameters(model))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_by_default_all_linear_layers_but_the_head_get_adapters(family: str, layers: set[str]) -> None:
    names = [name for name, _ in trained_parameters(trained_model(family))]

    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == layers
    assert len(names) == 2 * 2 * len(layers), "two layers, A and B"


def test_only_the_layers_asked_for_get_adapters() -> None:
    names = [name for name, _ in trained_parameters(trained_model(settings=LoraConfig(rank=2, target_modules=["v_proj", "q_proj"])))]

    assert sorted(names) == sorted(
        f"model.layers.{n}.self_attn.{x}_proj.lora_{m}.default.weight" for n in (0, 1) for x in "qv" for m in "AB"
    )


@pytest.mark.parametrize("target", ["query_key_value", "lm_head", "embed_tokens"])
def test_a_target_that_the_model_has_not_is_refused_with_those_that_it_has(target: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"target_modules names {target}, but the linear layers of LlamaForCausalLM .* are down_proj, gate_"
    ):
        add_adapters(plain_model(), LoraConfig(rank=2, target_modules=[target, "q_proj"]), seed=0)


def test_the_seed_decides_the_adapters_and_the_global_random_state_stays_untouched() -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = plain_model()
        before = torch.random.get_rng_state()
        add_adapters(model, LORA, seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        return next(parameter.detach() for name, parameter in trained_parameters(model) if "lora_A" in name)

    assert torch.equal(drawn(5), drawn(5)) and not torch.equal(drawn(5), drawn(6))


def test_adapters_of_a_bfloat16_model_are_bfloat16_and_merge_in_float32() -> None:
    """Added in bfloat16, an update smaller than a 256th of the weight would be lost."""
    model = plain_model().to(torch.bfloat16)
    add_adapters(model, LORA, seed=0)
    name, layer = "model.layers.0.mlp.up_proj.weight", model.get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        layer.lora_B.default.weight.fill_(1e-5)

    merged = next(part.merged() for part in plain_parts(model) if part.name == name)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and merged.dtype == torch.float32
    assert float((merged != layer.base_layer.weight.float()).float().mean()) > 0.99
    assert float((merged.to(torch.bfloat16) != layer.base_layer.weight).float().mean()) < 0.05


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_peft_loads_saved_adapters_on_the_base_and_merges_them_alike(family: str, tmp_path: Path) -> None:
    model = trained_model(family)
    plain_model(family).save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()

    save_adapters(
        {name: parameter.detach() for name, parameter in trained_parameters(model)}, LORA, tmp_path / "adapter", base="owner/name"
    )

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].base_model_name_or_path == "owner/name"
    peft_merged = dict(loaded.merge_and_unload().named_parameters())
    for part in plain_parts(model):
        torch.testing.assert_close(part.merged(), peft_merged[part.name], atol=1e-6, rtol=1e-6)

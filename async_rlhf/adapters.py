"""Low-rank adapters inside a model: PEFT makes them; they leave merged into the weights, or alone, as PEFT writes them.

A layer W becomes W + alpha / rank * B A, of which A and B are trained and B begins as zero: the model then computes what it did.
There is no dropout: a policy that is trained must give a token the probability with which it was sampled. Merging is arithmetic on a
copy, anew for each version; W itself never changes, so nothing adds up in it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from async_rlhf.config.lora import LoraConfig
from async_rlhf.errors import ConfigError

_ADAPTER = "default"
"""PEFT's name for the only adapter of a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One parameter of the plain model, and what the adapter beside it adds."""

    name: str
    """In the plain model."""
    weight: nn.Parameter
    down: nn.Parameter | None = None
    """A, [rank, in]; None: there is no adapter."""
    up: nn.Parameter | None = None
    """B, [out, rank]."""
    scale: float = 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that merging reads."""
        return [parameter for parameter in (self.weight, self.down, self.up) if parameter is not None]

    def merged(self) -> Tensor:
        """The weight with its adapter, in float32; without one, the weight itself."""
        if self.down is None or self.up is None:
            return self.weight
        return self.weight.detach().float() + self.scale * (self.up.detach().float() @ self.down.detach().float())


def add_adapters(model: PreTrainedModel, settings: LoraConfig, seed: int) -> None:
    """Freeze the model and put an adapter beside every target layer, in place; nothing where the rank is 0.

    Args:
        seed: decides A.
    Raises:
        ConfigError: a target is no linear layer of the model.
    """
    if not settings.rank:
        return
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(settings, target_layers(model, settings)), model, adapter_name=_ADAPTER)


def target_layers(model: PreTrainedModel, settings: LoraConfig) -> list[str]:
    """Names, without the place in the network, of the linear layers that get adapters: those asked for, or all but the head.

    Raises:
        ConfigError: see add_adapters.
    """
    head = model.get_output_embeddings()
    linear = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head)
    known = sorted({name.rpartition(".")[2] for name in linear})
    unknown = sorted(set(settings.target_modules) - set(known))
    if unknown or not known:
        raise ConfigError(
            f"learner.lora.target_modules names {', '.join(unknown) or 'nothing'}, but the linear layers of {type(model).__name__} below "
            f"its head are {', '.join(known) or 'none'}; leave it empty for all of these"
        )
    return sorted(settings.target_modules) or known


def plain_parts(model: nn.Module) -> Iterator[Part]:
    """Every parameter of the plain model, in layer order, tied ones once."""
    layers: dict[str, Any] = {f"{name}.": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        prefix, inside, kind = name.partition("base_layer.")
        if inside and kind == "weight":
            layer = layers[prefix]
            yield Part(
                name=prefix + kind,
                weight=parameter,
                down=layer.lora_A[_ADAPTER].weight,
                up=layer.lora_B[_ADAPTER].weight,
                scale=float(layer.scaling[_ADAPTER]),
            )
        else:
            yield Part(name=prefix + kind, weight=parameter)


def published(model: nn.Module, settings: LoraConfig) -> Iterator[Part]:
    """What the generators get of the model: the plain model's parameters, or the adapters alone."""
    if not settings.publishes_adapters:
        return plain_parts(model)
    return (Part(name=name, weight=parameter) for name, parameter in trained_parameters(model))


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What an optimizer changes: the adapters where there are any, else every parameter."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def save_adapters(tensors: Mapping[str, Tensor], settings: LoraConfig, folder: Path, base: str | None) -> None:
    """Write adapters as PEFT does: adapter_model.safetensors and adapter_config.json.

    Args:
        tensors: by the names of trained_parameters.
        base: the hub's name of the model that they belong to; None: it has none.
    """
    from safetensors.torch import save_file

    named = {f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _peft_config(settings, sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in named}))
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _peft_config(settings: LoraConfig, target_modules: list[str]) -> Any:
    from peft import LoraConfig as PeftConfig
    from peft import TaskType

    return cast(Any, PeftConfig)(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=target_modules, task_type=TaskType.CAUSAL_LM
    )

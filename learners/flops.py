"""Model FLOPs utilisation: the arithmetic that training needs, as a share of what the GPUs could do in the same time.

    MFU = (tokens x ((2 + 2) N + 2 N_trained) + 12 x layers x width x sum over sequences of length^2) / (seconds x ranks x peak)

N counts all parameters of the policy but the input embedding, N_trained those of them with a gradient: with adapters the weight
gradients of the frozen rest are never computed. The second term is attention's. Recomputed and padded tokens, the critic, and the
forwards before the first step are not counted: MFU is low, never high. The sum of squares is taken as
tokens^2 / sequences, its least value.
Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
}
"""Dense bfloat16, by whole words of the device's name; the first that fits. From the makers' data sheets."""
LESSER = ("MIG", "Laptop")
"""Words in the name of a device that is less than the one it is named after."""


@dataclass(frozen=True)
class ModelSize:
    """What the formula asks of a model."""

    num_parameters: int
    num_trained: int
    num_layers: int
    width: int


def size_of(model: PreTrainedModel) -> ModelSize:
    """Of a policy, also where ZeRO-3 has split its parameters."""
    config = model.config.get_text_config()
    tied = model.get_input_embeddings().weight is getattr(model.get_output_embeddings(), "weight", None)
    skipped = set() if tied else {id(model.get_input_embeddings().weight)}
    counts = [
        (int(getattr(parameter, "ds_numel", parameter.numel())), parameter.requires_grad)
        for parameter in model.parameters()
        if id(parameter) not in skipped
    ]
    return ModelSize(
        num_parameters=sum(count for count, _ in counts),
        num_trained=sum(count for count, trained in counts if trained),
        num_layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
    )


def training_flops(size: ModelSize, num_tokens: float, num_sequences: float) -> float:
    """Of forward and backward over all tokens; see above."""
    of_weights = num_tokens * (4 * size.num_parameters + 2 * size.num_trained)
    return of_weights + 12 * size.num_layers * size.width * num_tokens**2 / max(1.0, num_sequences)


def peak_flops(device_name: str, setting_tflops: float) -> float | None:
    """FLOP/s of one device: the setting, else by its name; None: unknown."""
    if setting_tflops:
        return setting_tflops * 1e12
    if any(_says(device_name, word) for word in LESSER):
        return None
    known = (peak for name, peak in PEAK_TFLOPS.items() if _says(device_name, name))
    return next((peak * 1e12 for peak in known), None)


def _says(device_name: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", device_name) is not None


def device_name() -> str:
    """Of this rank's GPU; empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""

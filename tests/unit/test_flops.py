"""Model FLOPs utilisation."""

import pytest

from learners.flops import ModelSize, peak_flops, size_of, training_flops
from tests.support.tiny_policy import tiny_policy


def test_flops_by_hand():
    """10 tokens x (4 x 100 + 2 x 25) + 12 x 2 layers x 8 wide x (two sequences of 5: 25 + 25) = 4500 + 9600."""
    size = ModelSize(num_parameters=100, num_trained=25, num_layers=2, width=8)

    assert training_flops(size, num_tokens=10, num_sequences=2) == 4500 + 9600


def test_sequences_of_unequal_length_are_counted_low_never_high():
    size = ModelSize(num_parameters=1, num_trained=1, num_layers=1, width=1)
    unequal = 10 * 6 + 12 * (1**2 + 9**2)

    assert training_flops(size, num_tokens=10, num_sequences=2) < unequal


def test_the_size_of_a_policy_leaves_out_the_input_embedding_and_what_is_frozen_is_not_trained():
    model = tiny_policy(0)
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    whole = sum(parameter.numel() for parameter in model.parameters()) - (0 if tied else embedding.numel())

    assert (size_of(model).num_parameters, size_of(model).num_trained) == (whole, whole)
    for parameter in model.parameters():
        parameter.requires_grad = False
    assert (size_of(model).num_parameters, size_of(model).num_trained) == (whole, 0)


@pytest.mark.parametrize(
    ("name", "setting", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 0.0, 989e12),
        ("NVIDIA H100 PCIe", 0.0, 756e12),
        ("NVIDIA A10G", 0.0, 70e12),
        ("NVIDIA H200", 500.0, 500e12),
        ("NVIDIA H100 NVL", 0.0, 835e12),
        ("NVIDIA A100-SXM4-80GB", 0.0, 312e12),
        ("NVIDIA GH200 480GB", 0.0, 989e12),
        ("NVIDIA L4", 0.0, 121e12),
        ("NVIDIA L40", 0.0, 181e12),
        ("NVIDIA L40S", 0.0, 362e12),
        ("NVIDIA RTX A1000", 0.0, None),
        ("NVIDIA GB200", 0.0, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 0.0, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0.0, None),
        ("NVIDIA GeForce RTX 4090", 0.0, 165e12),
        ("", 0.0, None),
        ("Some Other Device", 0.0, None),
    ],
)
def test_a_peak_is_the_setting_or_known_by_the_devices_name(name: str, setting: float, peak: float | None):
    assert peak_flops(name, setting) == peak

"""Packed batches on a GPU give what they give on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from async_rlhf.batching import Unit, collate, text_sequence
from async_rlhf.packing import make_layout, packed_attention
from async_rlhf.policy import make_scorer
from tests.support.tiny_policy import save_tiny_policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")

LENGTHS = (3, 17, 40, 41, 9, 128)


def test_attention_of_a_pack_equals_that_of_the_cpu() -> None:
    source = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(heads, sum(LENGTHS), 16, generator=source) for heads in (4, 2, 2))
    layout = make_layout(LENGTHS)

    expected = packed_attention(query, key, value, layout, None)
    got = packed_attention(query.cuda(), key.cuda(), value.cuda(), layout.to(torch.device("cuda")), None)

    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_log_probabilities_and_gradients_of_a_pack_equal_those_of_the_cpu(tmp_path: Path) -> None:
    folder = save_tiny_policy(tmp_path)
    rng = np.random.default_rng(0)
    units: list[Unit] = [(text_sequence(rng.integers(0, 20, length).tolist()),) for length in LENGTHS]
    results: list[tuple[torch.Tensor, torch.Tensor]] = []

    for device in ("cpu", "cuda"):
        scorer = make_scorer(folder, torch.float32, "packed", 128).to(device)
        logprobs, _ = scorer(collate(units, "packed").to(torch.device(device)), 1.0)
        logprobs.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])
        results.append((logprobs.detach().cpu(), gradient.cpu()))

    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-3 * float(results[0][1].abs().max()))

"""Weights on their way: parameters become arrays with checksums, and a canary text says what they must compute."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from async_rlhf.batching import Batching, text_microbatch
from async_rlhf.checksums import checksum
from async_rlhf.policy import CompletionScorer, load_policy, score_microbatch
from async_rlhf.types import TensorSpec, WeightsManifest, WeightsVersion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CANARY_TOKENS = 32
"""Length of the canary text."""

BUCKET_BYTES = 1 << 30
"""Versions travel in buckets of at most this size, one reference each; a larger tensor is a bucket of its own."""


def make_snapshot(
    parameters: Iterable[tuple[str, Tensor]],
    *,
    version: int,
    dtype: str,
    canary_ids: tuple[int, ...],
    canary_logprobs: tuple[float, ...],
) -> WeightsVersion:
    """Copy parameters into an immutable version, cast for the generators; see make_buckets."""
    empty = WeightsManifest(version=version, tensors=(), canary_ids=canary_ids, canary_logprobs=canary_logprobs)
    return WeightsVersion.of(list(make_buckets(parameters, empty, dtype)))


def make_buckets(
    parameters: Iterable[tuple[str, Tensor]], empty: WeightsManifest, dtype: str, *, lent: bool = False
) -> Iterator[WeightsVersion]:
    """Parameters, cast for the generators, in immutable buckets of at most BUCKET_BYTES; not `lent`, they share no memory with them.

    Each bucket is a part of the version with a manifest of its own: forget it before asking for the next, and no more than one is in
    memory. There is at least one.

    Args:
        parameters: (name in the Hugging Face state dict, full tensor), in layer order.
        empty: the version's manifest, without tensors.
        dtype: what the generators compute in.
        lent: whoever takes a bucket copies it before anything else happens to the parameters: what needs no cast is not copied here.
    """
    tensors: dict[str, np.ndarray] = {}
    specs: list[TensorSpec] = []
    num_bytes = 0
    for name, parameter in parameters:
        size = parameter.numel() * DTYPES[dtype].itemsize
        if tensors and num_bytes + size > BUCKET_BYTES:
            yield WeightsVersion(manifest=replace(empty, tensors=tuple(specs)), tensors=tensors)
            tensors, specs, num_bytes = {}, [], 0
        copy = not lent or hasattr(parameter, "ds_id")  # a partitioned one is only here until the next is gathered
        array = to_array(parameter.detach().to(device="cpu", dtype=DTYPES[dtype], copy=copy).contiguous())
        array.flags.writeable = False
        tensors[name] = array
        specs.append(TensorSpec(name=name, shape=tuple(parameter.shape), dtype=dtype, checksum=checksum(array)))
        num_bytes += size
    yield WeightsVersion(manifest=replace(empty, tensors=tuple(specs)), tensors=tensors)


def snapshot_of_folder(folder: Path, dtype: str) -> WeightsVersion:
    """The policy of a Hugging Face folder as version 0."""
    model = load_policy(folder, DTYPES[dtype]).eval()
    canary_ids = choose_canary(int(model.config.vocab_size))
    logprobs = score_canary(CompletionScorer(model), canary_ids, torch.device("cpu"), "padded")
    return make_snapshot(model.named_parameters(), version=0, dtype=dtype, canary_ids=canary_ids, canary_logprobs=logprobs)


def choose_canary(vocab_size: int) -> tuple[int, ...]:
    """A fixed text that touches many rows of the embedding: ids spread evenly over the vocabulary, in a shuffled order."""
    spread = np.linspace(0, vocab_size - 1, num=CANARY_TOKENS).round().astype(np.int64)
    return tuple(int(token) for token in np.random.default_rng(0).permutation(spread))


def score_canary(scorer: nn.Module, canary_ids: tuple[int, ...], device: torch.device, batching: Batching) -> tuple[float, ...]:
    """Log-probability of canary_ids[1:], temperature 1.

    Args:
        scorer: a CompletionScorer, wrapped or not; a collective call where its parameters are partitioned over ranks.
    """
    with torch.no_grad():
        logprobs, _ = score_microbatch(scorer, text_microbatch(canary_ids, batching), 1.0, device)
    return tuple(float(value) for value in logprobs[0])


def to_array(tensor: Tensor) -> np.ndarray:
    """A numpy view; bfloat16, which numpy lacks, as its int16 bits."""
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()

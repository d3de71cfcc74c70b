"""Is what the engine samples from really what the learner published? The checks of one weights version.

Manifest and checksums verify the transfer; the canary verifies the install: after it, the engine's log-probabilities of a
fixed text must equal the learner's. And a canary that cannot fail proves nothing, so each engine first shows that it can.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from async_rlhf.checksums import checksum
from async_rlhf.config.lora import LoraConfig
from async_rlhf.errors import ConfigError, WeightsError
from async_rlhf.types import TensorSpec, WeightsManifest, WeightsVersion

NOISE_NATS = {"float32": 1e-3, "bfloat16": 0.25}
"""What rounding alone may do to one log-probability between two implementations; measured 1e-5 and 0.1-0.2."""

STORE_SHARE = 0.8
"""How much of an object store the weights may take; batches and groups need the rest."""

PERTURBATION = 0.5
"""Relative size of the noise that the canary must notice."""

OF_ZEROS = 0.1
"""What it is relative to where all numbers are 0, as in the adapters before the first update."""


def shapes_of_folder(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the folder's safetensors files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"})
    return shapes


def shapes_of_versions(folder: Path, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a version: the parameters of the folder's model (its files may have buffers too, and older
    names), or those of its adapters.
    """
    from async_rlhf.adapters import add_adapters, published
    from async_rlhf.policy import empty_policy

    model = empty_policy(folder)
    add_adapters(model, lora, seed=0)
    return {part.name: tuple(part.weight.shape) for part in published(model, lora)}


def versions_with_room(shapes: Mapping[str, tuple[int, ...]], dtype: str, max_versions: int, store_bytes: float) -> int:
    """How many versions of the weights take less than 80 % of a node's object store, at most `max_versions`.

    Args:
        shapes: of every tensor; dtype: what they travel in.
        store_bytes: the smallest object store of any node.
    Raises:
        ConfigError: not even one does.
    """
    num_bytes = (2 if dtype == "bfloat16" else 4) * sum(math.prod(shape) for shape in shapes.values())
    if num_bytes > STORE_SHARE * store_bytes:
        raise ConfigError(
            f"one version of the weights takes {num_bytes / 2**20:.0f} MiB, more than {STORE_SHARE:.0%} of Ray's object store of "
            f"{store_bytes / 2**20:.0f} MiB; raise run.object_store_mib (on a cluster: ray start --object-store-memory), or set "
            "generator.dtype=bfloat16"
        )
    return min(max_versions, int(STORE_SHARE * store_bytes // max(1, num_bytes)))


def check_manifest(manifest: WeightsManifest, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError unless the manifest names exactly the expected tensors; a partial load would pass silently.

    A head that is tied to the embedding may be missing on either side.
    """
    got = {spec.name: spec.shape for spec in manifest.tensors}
    tied = {"lm_head.weight", "embed_out.weight"}
    missing = sorted(set(expected) - set(got) - tied)
    unknown = sorted(set(got) - set(expected) - tied)
    wrong = [f"{name} {got[name]} (expected {shape})" for name, shape in expected.items() if name in got and got[name] != shape]
    if missing or unknown or wrong:
        raise WeightsError(
            f"weights version {manifest.version} does not fit the model: missing {missing[:5]}, unknown {unknown[:5]}, "
            f"wrong shape {wrong[:5]}; learner and generator must be started from the same model folder"
        )


def check_tensors(weights: WeightsVersion) -> None:
    """Raise WeightsError unless every tensor arrived with the manifest's shape and checksum."""
    for spec in weights.manifest.tensors:
        array = weights.tensors.get(spec.name)
        if array is None:
            raise WeightsError(f"tensor {spec.name} of weights version {weights.manifest.version} did not arrive")
        if array.shape != spec.shape or checksum(array) != spec.checksum:
            raise WeightsError(
                f"tensor {spec.name} of weights version {weights.manifest.version} was damaged on its way (shape {array.shape}, "
                f"expected {spec.shape}, or its checksum differs)"
            )


def canary_error(manifest: WeightsManifest, logprobs: np.ndarray) -> float:
    """Largest absolute difference from the learner's log-probabilities, nats."""
    return float(np.max(np.abs(logprobs - np.asarray(manifest.canary_logprobs, dtype=np.float32))))


def tolerance_of(dtype: str, baseline: float, configured: float) -> float:
    """The allowed canary error: as configured, else four times the engine's own baseline, at least the dtype's noise.

    Raises:
        WeightsError: the baseline itself is beyond noise, so the very first install went wrong.
    """
    if configured:
        return configured
    if baseline > 2 * NOISE_NATS[dtype]:
        raise WeightsError(
            f"the engine's log-probabilities differ from the learner's by {baseline:.3g} nats right after the first install, more "
            f"than {dtype} rounding explains ({2 * NOISE_NATS[dtype]:g}); the engine does not compute this model"
        )
    return max(NOISE_NATS[dtype], 4 * baseline)


def perturbed(weights: WeightsVersion) -> WeightsVersion:
    """The same version with visible, seeded noise on every tensor: what a canary must notice."""
    rng = np.random.default_rng(0)
    tensors = {spec.name: _with_noise(weights.tensors[spec.name], spec, rng) for spec in weights.manifest.tensors}
    specs = tuple(replace(spec, checksum=checksum(tensors[spec.name])) for spec in weights.manifest.tensors)
    return WeightsVersion(manifest=replace(weights.manifest, tensors=specs), tensors=tensors)


def _with_noise(array: np.ndarray, spec: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    # A bfloat16 is the upper half of a float32.
    bf16 = spec.dtype == "bfloat16"
    values = (array.astype(np.uint16).astype(np.uint32) << 16).view(np.float32) if bf16 else array.astype(np.float32)
    scale = PERTURBATION * (max(float(values.std()), 1e-3) if values.any() else OF_ZEROS)
    noisy = (values + scale * rng.standard_normal(values.shape, dtype=np.float32)).astype(np.float32)
    if bf16:
        return (noisy.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    return noisy.astype(array.dtype)

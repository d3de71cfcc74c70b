"""The checks of one weights version: each must be able to fail."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import actors.generator
from actors.canary import (
    canary_error,
    check_manifest,
    check_tensors,
    perturbed,
    shapes_of_folder,
    shapes_of_versions,
    tolerance_of,
    versions_with_room,
)
from actors.generator import Generator
from async_rlhf.checksums import checksum
from async_rlhf.config import load_config
from async_rlhf.config.lora import LoraConfig
from async_rlhf.errors import ConfigError, WeightsError
from async_rlhf.policy import load_policy
from async_rlhf.protocols import Occupancy
from async_rlhf.snapshot import snapshot_of_folder
from async_rlhf.types import TensorSpec, WeightsManifest, WeightsVersion
from tests.support.cluster import make_model_folder

RNG = np.random.default_rng(0)
VALUES = {
    "embed.weight": RNG.normal(size=(4, 3)).astype(np.float32),
    "norm.weight": np.ones(3, dtype=np.float32),
    "bias": np.zeros(5, dtype=np.float32),
}
SHAPES = {name: array.shape for name, array in VALUES.items()}


def travelling(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array as it travels: bfloat16 as its int16 bits."""
    tensor = torch.from_numpy(array.copy()).to(getattr(torch, dtype))
    return tensor.view(torch.int16).numpy() if dtype == "bfloat16" else tensor.numpy()


def values_of(array: np.ndarray, dtype: str) -> np.ndarray:
    tensor = torch.from_numpy(array.copy())
    return (tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor).float().numpy()


def make_weights(dtype: str = "float32", *, version: int = 0, logprobs: Sequence[float] = (-1.0, -2.0)) -> WeightsVersion:
    tensors = {name: travelling(array, dtype) for name, array in VALUES.items()}
    specs = tuple(TensorSpec(name=name, shape=a.shape, dtype=dtype, checksum=checksum(a)) for name, a in tensors.items())
    manifest = WeightsManifest(version=version, tensors=specs, canary_ids=(3, 4, 5), canary_logprobs=tuple(logprobs))
    return WeightsVersion(manifest=manifest, tensors=tensors)


# Manifest.


def manifest_of(shapes: dict[str, tuple[int, ...]]) -> WeightsManifest:
    specs = tuple(TensorSpec(name=name, shape=shape, dtype="float32", checksum=0) for name, shape in shapes.items())
    return WeightsManifest(version=3, tensors=specs, canary_ids=(1, 2), canary_logprobs=(0.0,))


def test_the_expected_tensors_pass():
    check_manifest(manifest_of(SHAPES), SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, r"missing \['bias'\], unknown \[\], wrong shape \[\]"),
        ({"extra": (2,)}, r"missing \[\], unknown \['extra'\]"),
        ({"bias": (6,)}, r"wrong shape \['bias \(6,\) \(expected \(5,\)\)'\]"),
        ({"embed.weight": (3, 4)}, r"wrong shape \['embed.weight"),
        ({"lm_head.weight": None, "bias": None}, r"missing \['bias'\]"),
    ],
    ids=["missing", "unknown", "other length", "transposed", "missing beside a tied head"],
)
def test_a_manifest_that_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str):
    changed = {name: shape for name, shape in (SHAPES | change).items() if shape is not None}

    with pytest.raises(WeightsError, match="weights version 3 does not fit the model: .*" + message):
        check_manifest(manifest_of(changed), SHAPES)


@pytest.mark.parametrize("head", ["lm_head.weight", "embed_out.weight"])
def test_a_tied_head_may_be_missing_on_either_side_but_not_have_another_shape(head: str):
    with_head = SHAPES | {head: (4, 3)}

    check_manifest(manifest_of(SHAPES), with_head)
    check_manifest(manifest_of(with_head), SHAPES)
    with pytest.raises(WeightsError, match="wrong shape"):
        check_manifest(manifest_of(SHAPES | {head: (5, 3)}), with_head)


def test_the_size_of_the_weights_comes_from_the_headers_of_all_safetensors_files(tmp_path: Path):
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    save_file({"b": np.zeros((4,), np.float32), "scalar": np.array(1, np.float32)}, tmp_path / "model-2.safetensors")

    assert shapes_of_folder(tmp_path) == {"a": (2, 3), "b": (4,), "scalar": ()}


def test_expected_are_the_parameters_that_a_learner_has_whatever_else_older_files_hold(tmp_path: Path):
    """Pythia's files have attention masks, and name the head otherwise than transformers does."""
    folder = make_model_folder(tmp_path, family="gpt_neox")
    tensors = load_file(folder / "model.safetensors")
    assert "embed_out.weight" in tensors
    save_file({**tensors, "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 8, 8), np.float32)}, folder / "model.safetensors")
    parameters = {name: tuple(parameter.shape) for name, parameter in load_policy(folder).named_parameters()}

    assert shapes_of_versions(folder, LoraConfig()) == parameters
    assert "lm_head.weight" in parameters
    check_manifest(snapshot_of_folder(folder, "float32").manifest, shapes_of_versions(folder, LoraConfig()))


# Checksums.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_undamaged_tensors_pass(dtype: str):
    check_tensors(make_weights(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(VALUES))
def test_one_flipped_bit_is_noticed(dtype: str, name: str):
    weights = make_weights(dtype)
    damaged = weights.tensors[name].copy()
    damaged.reshape(-1).view(np.uint8)[-1] ^= 1

    with pytest.raises(WeightsError, match=f"tensor {name} of weights version 0 was damaged"):
        check_tensors(replace(weights, tensors={**weights.tensors, name: damaged}))


def test_the_same_bytes_in_another_shape_are_noticed():
    weights = make_weights()
    tensors = {**weights.tensors, "embed.weight": weights.tensors["embed.weight"].reshape(3, 4)}

    with pytest.raises(WeightsError, match=r"shape \(3, 4\), expected \(4, 3\)"):
        check_tensors(replace(weights, tensors=tensors))


def test_a_tensor_that_did_not_arrive_is_noticed():
    weights = make_weights()
    tensors = {name: array for name, array in weights.tensors.items() if name != "bias"}

    with pytest.raises(WeightsError, match="tensor bias of weights version 0 did not arrive"):
        check_tensors(replace(weights, tensors=tensors))


def test_a_view_that_is_not_contiguous_is_checked_by_its_values():
    weights = make_weights()
    tensors = {**weights.tensors, "embed.weight": np.asfortranarray(weights.tensors["embed.weight"])}

    check_tensors(replace(weights, tensors=tensors))


# The canary.


def test_canary_error_is_the_largest_difference_on_either_side():
    manifest = make_weights(logprobs=(-1.0, -2.0, -3.0)).manifest

    assert canary_error(manifest, np.float32([-1.0, -2.25, -2.5])) == pytest.approx(0.5, abs=1e-6)
    assert canary_error(manifest, np.float32([-1.0, -2.75, -3.0])) == pytest.approx(0.75, abs=1e-6)
    assert canary_error(manifest, np.float32([-1.0, -2.0, -3.0])) == 0.0


@pytest.mark.parametrize(
    ("dtype", "baseline", "configured", "expected"),
    [
        ("float32", 1e-5, 0.0, 1e-3),
        ("float32", 1e-3, 0.0, 4e-3),
        ("bfloat16", 0.01, 0.0, 0.25),
        ("bfloat16", 0.2, 0.0, 0.8),
        ("float32", 1e-5, 0.7, 0.7),
    ],
)
def test_tolerance_is_the_configured_one_or_four_baselines_but_no_less_than_rounding(dtype, baseline, configured, expected):
    assert tolerance_of(dtype, baseline, configured) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("dtype", "baseline"), [("float32", 2.1e-3), ("bfloat16", 0.51), ("float32", float("inf"))])
def test_a_baseline_beyond_rounding_is_refused(dtype: str, baseline: float):
    with pytest.raises(WeightsError, match="right after the first install"):
        tolerance_of(dtype, baseline, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_perturbed_weights_differ_visibly_in_every_tensor_and_stay_finite(dtype: str):
    weights = make_weights(dtype)

    noisy = perturbed(weights)

    check_tensors(noisy)
    for spec in weights.manifest.tensors:
        before, after = (values_of(w.tensors[spec.name], dtype) for w in (weights, noisy))
        assert noisy.tensors[spec.name].dtype == weights.tensors[spec.name].dtype
        assert np.isfinite(after).all() and not np.array_equal(before, after), spec.name
    before, after = (values_of(w.tensors["embed.weight"], dtype) for w in (weights, noisy))
    # Noise of half the tensor's own spread: 12 draws, so between a fifth and the whole of it.
    assert 0.2 < (after - before).std() / before.std() < 1.0


def test_perturbing_is_repeatable_and_leaves_the_original_alone():
    weights = make_weights("bfloat16")
    original = {name: array.copy() for name, array in weights.tensors.items()}

    first, second = perturbed(weights), perturbed(weights)

    for name, array in original.items():
        assert np.array_equal(weights.tensors[name], array)
        assert np.array_equal(first.tensors[name], second.tensors[name])
    assert first.manifest == second.manifest


# The generator's use of it.


class SingingEngine:
    """Answers with what it was told to sing for the loaded weights: the right ones, or noise after perturbed ones."""

    num_running = 0
    occupancy = Occupancy(num_running=0, num_waiting=0, kv_use_share=0.0)

    def __init__(self, sound: Sequence[float], disturbed: Sequence[float]) -> None:
        self.sound, self.disturbed = sound, disturbed
        self.loaded: list[WeightsVersion] = []

    def load(self, weights: WeightsVersion) -> None:
        self.loaded.append(weights)

    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        intact = np.array_equal(self.loaded[-1].tensors["embed.weight"], VALUES["embed.weight"])
        return np.float32(self.sound if intact else self.disturbed)

    def step(self) -> list[Any]:
        return []

    def close(self) -> None: ...


def make_generator(engine: SingingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Generator:
    monkeypatch.setattr(actors.generator, "shapes_of_versions", lambda folder, lora: SHAPES)
    monkeypatch.setattr(actors.generator, "make_engine", lambda config, folder: engine)
    return Generator(load_config(overrides=["generator.engine=transformers", *overrides]).config, str(tmp_path), "generator-0.0")


RIGHT, WRONG, NAN = (-1.0, -2.0), (-1.5, -2.5), (float("nan"), -2.0)


def test_a_right_canary_installs_and_the_proof_ends_with_the_true_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = SingingEngine(RIGHT, WRONG)
    generator = make_generator(engine, tmp_path, monkeypatch)

    first, second = generator.install(make_weights()), generator.install(make_weights(version=1))

    assert (first.version, first.canary_error, second.version) == (0, 0.0, 1)
    intact = [np.array_equal(weights.tensors["embed.weight"], VALUES["embed.weight"]) for weights in engine.loaded]
    assert intact == [True, False, True, True]
    generator.close()


@pytest.mark.parametrize("overrides", [[], ["weights.canary_tolerance=0.1"]], ids=["baseline", "configured"])
@pytest.mark.parametrize("sound", [WRONG, NAN], ids=["wrong", "nan"])
def test_a_canary_that_does_not_sing_at_the_first_install_is_refused(sound, overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generator = make_generator(SingingEngine(sound, (-9.0, -9.0)), tmp_path, monkeypatch, *overrides)

    with pytest.raises(WeightsError, match="log-probabilities differ"):
        generator.install(make_weights())
    generator.close()


@pytest.mark.parametrize("sound", [WRONG, NAN], ids=["wrong", "nan"])
def test_a_canary_that_stops_singing_later_is_refused(sound: Sequence[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = SingingEngine(RIGHT, WRONG)
    generator = make_generator(engine, tmp_path, monkeypatch)
    generator.install(make_weights())
    engine.sound = sound

    with pytest.raises(WeightsError, match=r"generator-0\.0: after installing version 1 .* samples from other weights"):
        generator.install(make_weights(version=1))
    generator.close()


@pytest.mark.parametrize("disturbed", [RIGHT, (-1.0005, -2.0), NAN], ids=["unmoved", "within rounding", "nan"])
def test_a_canary_that_cannot_fail_proves_nothing(disturbed: Sequence[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generator = make_generator(SingingEngine(RIGHT, disturbed), tmp_path, monkeypatch)

    with pytest.raises(WeightsError, match="the canary cannot fail, so it proves nothing"):
        generator.install(make_weights())
    generator.close()


def test_without_verification_nothing_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = SingingEngine(NAN, NAN)
    generator = make_generator(engine, tmp_path, monkeypatch, "weights.verify=false")

    report = generator.install(make_weights())

    assert (report.canary_error, len(engine.loaded)) == (0.0, 1)
    generator.close()


@pytest.mark.parametrize(
    ("dtype", "store_mib", "expected"), [("float32", 16, 1), ("bfloat16", 16, 2), ("float32", 1024, 2), ("float32", 10, 1)]
)
def test_as_many_versions_are_kept_as_the_object_store_has_room_for(dtype: str, store_mib: int, expected: int) -> None:
    """A version is (1024 x 1024 + 1024 x 1024) x 4 bytes = 8 MiB: 80 % of 16 MiB is 12.8, so one; in bfloat16 it is 4 MiB, so two."""
    shapes = {"a": (1024, 1024), "b": (1024, 1024)}

    assert versions_with_room(shapes, dtype, 2, store_mib * 2**20) == expected


def test_a_version_that_would_fill_the_object_store_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"one version of the weights takes 4 MiB.*80% of .* 4 MiB; raise run\.object_store_mib"):
        versions_with_room({"a": (1024, 1024)}, "float32", 2, 4 * 2**20)

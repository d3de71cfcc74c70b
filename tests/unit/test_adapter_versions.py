"""Generators that get adapters alone: the reference engine, the manifest, and a canary that can fail before the first update."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.canary import shapes_of_versions
from actors.generator import Generator
from async_rlhf.config.lora import LoraConfig
from async_rlhf.errors import WeightsError
from async_rlhf.snapshot import snapshot_of_folder
from tests.support.adapted import adapted_policy, adapted_version
from tests.support.cluster import make_model_folder, small_config
from tests.support.samples import make_ticket
from tests.support.tiny_policy import logprobs_of

LORA = LoraConfig(rank=3, alpha=6.0, publish="adapter")
CONFIG = small_config(
    *("generator.engine=transformers", "generator.max_model_len=64", "generator.temperature=0.8"),
    *("learner.lora.rank=3", "learner.lora.alpha=6", "learner.lora.publish=adapter"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "start")


def test_a_version_holds_the_adapters_alone_and_its_manifest_is_what_a_generator_expects(folder: Path) -> None:
    weights = adapted_version(folder, LORA, 1)

    assert {spec.name: spec.shape for spec in weights.manifest.tensors} == shapes_of_versions(folder, LORA)
    assert all(".lora_" in name for name in weights.tensors)
    assert shapes_of_versions(folder, replace(LORA, publish="merged")) == shapes_of_versions(folder, LoraConfig())


def test_each_version_is_installed_and_sampled_from(folder: Path) -> None:
    generator = Generator(CONFIG, str(folder), "generator-0.0")
    try:
        for version in (0, 1, 2, 1):
            # Version 0 adds nothing, since B is zero: the canary must be able to fail there too.
            report = generator.install(adapted_version(folder, LORA, version))
            assert report.canary_error < 1e-4
            [rollout] = generator.evaluate([make_ticket().prompt], 0.0)
            model = adapted_policy(folder, LORA, version)
            expected = logprobs_of(model, make_ticket().prompt.token_ids.tolist(), rollout.completion_ids.tolist())
            np.testing.assert_allclose(rollout.behavior_logprobs, expected, atol=1e-4)
    finally:
        generator.close()


def test_whole_weights_are_refused_where_adapters_are_expected_and_the_other_way_round(folder: Path) -> None:
    whole, adapters = snapshot_of_folder(folder, "float32"), adapted_version(folder, LORA, 0)
    for config, weights in ((CONFIG, whole), (small_config("generator.engine=transformers", "generator.max_model_len=64"), adapters)):
        generator = Generator(config, str(folder), "generator-0.0")
        try:
            with pytest.raises(WeightsError, match=r"weights version 0 does not fit the model: missing"):
                generator.install(weights)
        finally:
            generator.close()

"""A learner that goes on from a checkpoint is the learner that wrote it, bit by bit, on however many ranks and at whatever stage."""

import asyncio
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from actors.launch import Cluster
from async_rlhf.config import Config
from async_rlhf.errors import ConfigError, RunError
from async_rlhf.sharding import shard_batch
from async_rlhf.types import StepReport, WeightsVersion
from tests.support.cluster import local_cluster, make_model_folder, small_config
from tests.support.pacing import eventually
from tests.support.ranks import Ranks, learner_worlds, make_batch
from tests.support.settings import with_value

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

COMMON = ("batch_groups=8", "completions_per_prompt=4", "updates=8", "algorithm.minibatches_per_batch=2")
COMMON = (*COMMON, "learner.warmup_steps=2", "learner.weight_decay=0.1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "start")


@pytest.fixture(scope="module")
def odd_folder(folder: Path) -> Path:
    """A model of width 63, which two ranks cannot share evenly; its first norm's weights are -0."""
    odd = folder.with_name("odd")
    shutil.copytree(folder, odd)
    config = LlamaConfig.from_pretrained(odd, hidden_size=63, num_attention_heads=1, num_key_value_heads=1, head_dim=32)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    torch.nn.init.constant_(cast(torch.Tensor, model.model.layers[0].input_layernorm.weight), -0.0)
    model.save_pretrained(odd)
    return odd


@pytest.fixture(scope="module")
def worlds(cluster: Cluster, folder: Path) -> Iterator[dict[int, Ranks]]:
    with learner_worlds(cluster, folder, (1, 2)) as worlds:
        yield worlds


class FreshLearner:
    """A fresh learner on ranks that are there already."""

    def __init__(self, worlds: dict[int, Ranks], config: Config, checkpoint: Path | None = None, folder: Path | None = None) -> None:
        self.ranks = worlds[config.learner.num_ranks]
        self.config = config
        path = None if checkpoint is None else str(checkpoint)
        versions = asyncio.run(self.ranks.all("switch", config, 1 << 20, path, "" if folder is None else str(folder)))
        self.version = versions[0]
        assert set(versions) == {self.version}

    def train(self, *updates: int) -> list[StepReport]:
        """Rank 0's reports."""
        num_ranks, num_minibatches = len(self.ranks.actors), self.config.algorithm.minibatches_per_batch
        shards = [shard_batch(make_batch(update), num_ranks=num_ranks, num_minibatches=num_minibatches) for update in updates]
        return [asyncio.run(self.ranks.group.train_step(u, shard))[0] for u, shard in zip(updates, shards, strict=True)]

    def save(self, folder: Path, version: int) -> dict[str, tuple[int, int]]:
        asyncio.run(self.ranks.group.save(str(folder), version))
        return asyncio.run(self.ranks.group.saved())

    def weights(self) -> WeightsVersion:
        return self.ranks.weights(0)

    def digest(self) -> int:
        return self.weights().manifest.digest

    def call(self, method: str, *args: object) -> list[object]:
        return asyncio.run(self.ranks.all(method, *args))


def config_of(algorithm: str, num_ranks: int, stage: int, precision: str = "float32", rank: int = 0) -> Config:
    settings = (f"learner.num_ranks={num_ranks}", f"learner.zero_stage={stage}", f"learner.precision={precision}")
    settings = (*settings, f"learner.lora.rank={rank}")
    return small_config(f"algorithm={algorithm}", *COMMON, *settings, "generator.dtype=float32")


def tensors_of(folder: Path, model: str) -> dict[str, torch.Tensor]:
    """All ranks' tensors of one model, read by the library itself."""
    merged: dict[str, torch.Tensor] = {}
    for path in sorted((folder / "learner").glob(f"{model}-*.safetensors")):
        tensors = load_file(path)
        assert not merged.keys() & tensors.keys()
        merged |= tensors
    return merged


CASES = {
    "one rank, stage 0": ("rloo", 1, 0),
    "one rank, stage 1": ("dpo", 1, 1),
    "one rank, stage 2, bfloat16": ("rloo", 1, 2, "bfloat16"),
    "one rank, stage 3": ("rloo", 1, 3),
    "two ranks, stage 0, critic": ("ppo", 2, 0),
    "two ranks, stage 1, bfloat16": ("rloo", 2, 1, "bfloat16"),
    "two ranks, stage 2, critic": ("ppo", 2, 2),
    "two ranks, stage 3, critic, bfloat16": ("ppo", 2, 3, "bfloat16"),
    "two ranks, stage 3": ("dpo", 2, 3),
    "one rank, stage 0, adapters": ("rloo", 1, 0, "float32", 4),
    "two ranks, stage 1, adapters, critic": ("ppo", 2, 1, "float32", 4),
    "two ranks, stage 2, adapters, bfloat16": ("rloo", 2, 2, "bfloat16", 4),
    "two ranks, stage 3, adapters": ("dpo", 2, 3, "float32", 3),
}


@pytest.mark.parametrize("case", CASES)
def test_a_learner_that_goes_on_from_a_checkpoint_repeats_the_one_that_wrote_it_bit_by_bit(
    worlds: dict[int, Ranks], tmp_path: Path, case: str
) -> None:
    config = config_of(*CASES[case])
    first = FreshLearner(worlds, config)
    first.train(0, 1)
    facts = first.save(tmp_path, version=2)
    at_save, draws = first.digest(), first.call("draw")
    reports, at_end = first.train(2, 3), first.digest()

    second = FreshLearner(worlds, config, checkpoint=tmp_path)

    assert second.version == 2
    assert second.digest() == at_save
    assert second.call("draw") == draws, "each rank's random numbers go on"
    again = second.train(2, 3)
    assert [report.metrics for report in again] == [report.metrics for report in reports]
    assert [report.optimizer_steps for report in again] == [report.optimizer_steps for report in reports] == [6, 8]
    assert reports[0].metrics["train/learning_rate"] > reports[1].metrics["train/learning_rate"] > 0
    assert second.digest() == at_end != at_save
    assert all((path.stat().st_size, zlib.crc32(path.read_bytes())) == facts[name] for name in facts for path in [tmp_path / name])
    assert sorted(facts) == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))


RESHARDINGS = {
    "2 ranks at stage 2 to 1 at stage 0": (config_of("ppo", 2, 2), config_of("ppo", 1, 0)),
    "1 rank at stage 0 to 2 at stage 3": (config_of("ppo", 1, 0), config_of("ppo", 2, 3)),
    "2 ranks at stage 3 to 1 at stage 1": (config_of("rloo", 2, 3), config_of("rloo", 1, 1)),
    "bfloat16, 1 rank at stage 3 to 2 at stage 2": (config_of("rloo", 1, 3, "bfloat16"), config_of("rloo", 2, 2, "bfloat16")),
    "adapters, 2 ranks at stage 3 to 1 at stage 0": (config_of("rloo", 2, 3, rank=3), config_of("rloo", 1, 0, rank=3)),
    "adapters, 1 rank at stage 1 to 2 at stage 3": (config_of("rloo", 1, 1, rank=3), config_of("rloo", 2, 3, rank=3)),
}


@pytest.mark.parametrize("case", RESHARDINGS)
def test_a_checkpoint_goes_on_with_other_ranks_and_at_another_stage(
    worlds: dict[int, Ranks], odd_folder: Path, tmp_path: Path, case: str
) -> None:
    """Bit-equal when loaded and when saved again; training differs by the order of the ranks' sums alone."""
    before, after = RESHARDINGS[case]
    first = FreshLearner(worlds, before, folder=odd_folder)
    first.train(0, 1)
    first.save(tmp_path / "first", version=2)
    at_save = first.digest()
    reports = first.train(2, 3)

    second = FreshLearner(worlds, after, checkpoint=tmp_path / "first", folder=odd_folder)
    second.save(tmp_path / "second", version=2)

    assert second.digest() == at_save
    for model in ("policy", "critic"):
        written, rewritten = tensors_of(tmp_path / "first", model), tensors_of(tmp_path / "second", model)
        assert written.keys() == rewritten.keys()
        for key, tensor in written.items():
            assert torch.equal(rewritten[key].view(torch.int32), tensor.view(torch.int32)), key
    rtol = 1e-5 if before.learner.precision == "float32" else 0.02
    for report, again in zip(reports, second.train(2, 3), strict=True):
        assert again.optimizer_steps == report.optimizer_steps
        for key in ("train/grad_norm", "train/learning_rate", "policy/entropy_nats", "value/loss", "value/grad_norm"):
            if key in report.metrics:
                np.testing.assert_allclose(again.metrics[key], report.metrics[key], rtol=rtol, err_msg=key)
        np.testing.assert_allclose(again.metrics["train/loss"], report.metrics["train/loss"], rtol=rtol, atol=1e-6 if rtol < 1e-4 else 0.01)


def test_a_checkpoint_before_the_first_update_holds_every_weight_to_its_sign_of_zero_and_no_moments(
    worlds: dict[int, Ranks], odd_folder: Path, tmp_path: Path
) -> None:
    first = FreshLearner(worlds, config_of("rloo", 2, 2), folder=odd_folder)
    first.save(tmp_path, version=0)
    start = first.digest()
    reports = first.train(0, 1)

    tensors = tensors_of(tmp_path, "policy")
    second = FreshLearner(worlds, config_of("rloo", 2, 2), checkpoint=tmp_path, folder=odd_folder)

    zeros = tensors["master/model.layers.0.input_layernorm.weight"]
    assert bool((zeros == 0).all() and zeros.signbit().all())
    assert all(not tensor.any() for key, tensor in tensors.items() if not key.startswith("master/"))
    assert (second.version, second.digest()) == (0, start)
    assert [report.metrics for report in second.train(0, 1)] == [report.metrics for report in reports]


def test_each_rank_writes_about_its_share_and_tied_parameters_come_once(
    worlds: dict[int, Ranks], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tied = make_model_folder(tmp_path_factory.mktemp("tied") / "start", tied=True)
    learner = FreshLearner(worlds, config_of("rloo", 2, 2), folder=tied)
    learner.train(0)

    facts = learner.save(tmp_path, version=1)

    sizes = [facts[f"learner/policy-{rank:05d}-of-00002.safetensors"][0] for rank in range(2)]
    assert max(sizes) < 0.6 * sum(sizes)
    names = {key.partition("/")[2] for key in tensors_of(tmp_path, "policy")}
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    again = FreshLearner(worlds, config_of("rloo", 2, 2), checkpoint=tmp_path, folder=tied)
    assert again.digest() == learner.digest()


def test_a_checkpoint_of_adapters_holds_these_alone_and_is_refused_by_other_ones(worlds: dict[int, Ranks], tmp_path: Path) -> None:
    settings = config_of("rloo", 2, 2, rank=3)
    learner = FreshLearner(worlds, settings)
    learner.train(0)

    learner.save(tmp_path, version=1)

    tensors = tensors_of(tmp_path, "policy")
    assert tensors and all(".lora_" in key for key in tensors)
    for other in (config_of("rloo", 2, 2), config_of("rloo", 2, 2, rank=4), with_value(settings, "learner.lora.alpha", 8.0)):
        with pytest.raises(ConfigError, match=r"learner.json: the checkpoint was written with learner.lora .*'rank': 3, 'alpha': 16.0"):
            FreshLearner(worlds, other, checkpoint=tmp_path)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_show_in_it(worlds: dict[int, Ranks], tmp_path: Path) -> None:
    """The disk holds the first file until the update is through."""

    def written(folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))

    learner = FreshLearner(worlds, config_of("ppo", 1, 0))
    learner.train(0)
    plain = learner.save(tmp_path / "plain", version=1)
    held, free = tmp_path / "overlapped", tmp_path / "free"
    learner.call("hold_disk", str(free))
    try:
        asyncio.run(learner.ranks.group.save(str(held), 1))
        eventually(lambda: bool(written(held)))
        learner.train(1)
        meanwhile = written(held)
        free.touch()
        overlapped = asyncio.run(learner.ranks.group.saved())
    finally:
        free.touch()
        learner.call("hold_disk", "")

    assert len(meanwhile) == 1 and written(held) == sorted(plain)
    assert overlapped == plain, "sizes and checksums of the files"


def test_a_second_save_waits_for_the_first_and_both_are_written(worlds: dict[int, Ranks], tmp_path: Path) -> None:
    learner = FreshLearner(worlds, config_of("rloo", 1, 0))
    learner.call("slow_disk", 0.1)
    try:
        asyncio.run(learner.ranks.group.save(str(tmp_path / "first"), 0))
        second = learner.save(tmp_path / "second", version=0)
    finally:
        learner.call("slow_disk", 0.0)

    for name, (size, crc) in second.items():
        for folder in ("first", "second"):
            content = (tmp_path / folder / name).read_bytes()
            assert (len(content), zlib.crc32(content)) == (size, crc)


def test_a_failed_write_is_told_by_saved_and_leaves_the_learner_as_it_was(worlds: dict[int, Ranks], tmp_path: Path) -> None:
    learner = FreshLearner(worlds, config_of("rloo", 2, 2))
    learner.train(0)
    digest = learner.digest()
    learner.call("limit_file_size", 64 << 10)
    try:
        with pytest.raises(RunError, match=r"policy-0000\d-of-00002.safetensors of a checkpoint could not be written: .*File too large"):
            learner.save(tmp_path / "full", version=1)
    finally:
        learner.call("limit_file_size", -1)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError, match=r"could not be written: .*Not a directory.*free space there, or mend its permissions"):
        learner.save(tmp_path / "file", version=1)

    facts = learner.save(tmp_path / "after", version=1)

    assert len(facts) == 5
    assert learner.digest() == digest
    assert learner.train(1)[0].optimizer_steps == 4


def damage(checkpoint: Path, how: str) -> None:
    policy = checkpoint / "learner/policy-00001-of-00002.safetensors"
    match how:
        case "no facts":
            (checkpoint / "learner/learner.json").unlink()
        case "damaged facts":
            (checkpoint / "learner/learner.json").write_text('{"format": 1, "version": 2}')
        case "newer format":
            path = checkpoint / "learner/learner.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
        case "missing share":
            policy.unlink()
        case "truncated share":
            policy.write_bytes(policy.read_bytes()[:-100])
        case "missing rank":
            (checkpoint / "learner/rank-00000-of-00002.json").unlink()
        case "truncated rank":
            path = checkpoint / "learner/rank-00000-of-00002.json"
            path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "no facts": r"learner.json of the checkpoint does not exist; resume from a complete checkpoint",
    "damaged facts": r"learner.json is damaged: .*missing .* required .*'num_ranks'",
    "newer format": r"learner.json: format is 99, expected 1",
    "missing share": r"policy-00001-of-00002.safetensors of the checkpoint does not exist",
    "truncated share": r"policy-00001-of-00002.safetensors is damaged: .*; expected a whole safetensors file",
    "missing rank": r"rank-00000-of-00002.json of the checkpoint does not exist",
    "truncated rank": r"rank-00000-of-00002.json is damaged",
}


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    worlds: dict[int, Ranks], odd_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = config_of("rloo", 2, 2)
    whole = tmp_path / "whole"
    learner = FreshLearner(worlds, plain)
    learner.train(0)
    learner.save(whole, version=1)
    with_critic = FreshLearner(worlds, config_of("ppo", 1, 0))
    with_critic.save(tmp_path / "critic", version=0)
    tied = make_model_folder(tmp_path_factory.mktemp("tied") / "start", tied=True)
    one = config_of("rloo", 1, 0)

    for how, message in DAMAGES.items():
        broken = tmp_path / how
        shutil.copytree(whole, broken)
        damage(broken, how)
        with pytest.raises(ConfigError, match=message):
            FreshLearner(worlds, one, checkpoint=broken)
    with pytest.raises(ConfigError, match=r"model.embed_tokens.weight has shape \[\d+, 64\], but has \[\d+, 63\] in the model that is"):
        FreshLearner(worlds, one, checkpoint=whole, folder=odd_folder)
    with pytest.raises(ConfigError, match=r"lm_head.weight has shape .*, but does not exist in the model that is to be trained"):
        FreshLearner(worlds, one, checkpoint=whole, folder=tied)
    with pytest.raises(ConfigError, match=r"holds policy, but algorithm.name trains policy and critic; resume with the algorithm"):
        FreshLearner(worlds, config_of("ppo", 1, 0), checkpoint=whole)
    with pytest.raises(ConfigError, match=r"holds policy and critic, but algorithm.name trains policy; resume with the algorithm"):
        FreshLearner(worlds, one, checkpoint=tmp_path / "critic")
    small = FreshLearner(worlds, one, folder=tied)
    small.save(tmp_path / "tied", version=0)
    with pytest.raises(ConfigError, match=r"3 of \d+ tensors are missing in policy-00000-of-00001.safetensors, .*lm_head.weight for one"):
        FreshLearner(worlds, one, checkpoint=tmp_path / "tied")

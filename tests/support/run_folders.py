"""Run folders made by hand, as a driver and its learner ranks leave them."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from async_rlhf.adapters import add_adapters, trained_parameters
from async_rlhf.checkpoints import commit, folder_of
from async_rlhf.config import Config, load_config, to_yaml
from async_rlhf.journal import Mark
from async_rlhf.policy import load_policy
from async_rlhf.state import TrainingState, write_atomically
from learners.checkpoint import FACTS_NAME, FORMAT, MASTER, MOMENTS, CheckpointWriter, LearnerFacts, file_names

SECRET = "hunter2"
SETTINGS = ("generator.temperature=0.6", "updates=9", f"env.OPENAI_API_KEY={SECRET}", "algorithm.name=rloo", "completions_per_prompt=4")
SETTINGS = (*SETTINGS, "learner.zero_stage=2")


def make_run(folder: Path, start: Path, *settings: str) -> Config:
    """A run folder that its driver left behind after version 3."""
    config = load_config(overrides=[*SETTINGS, *settings]).config
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "origin.json").write_text(json.dumps({"model_folder": str(start), "reward": "r:score", "metric": "m:score"}))
    rows = [{"update": v - 1, "version": v, "reward/mean": v / 10, "rollout/kl_k1_nats": v / 100} for v in (1, 2, 3, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"prompt": "p", "completion": "c", "expected": "e"}
    samples = {name: {"version": v, "samples": [{**sample, "score": s} for s in (v / 4, 1.0)]} for name, v in (("start", 0), ("final", 4))}
    (folder / "samples.json").write_text(json.dumps(samples))
    write_atomically(folder / "state.json", state_of(3).to_json())
    return config


def state_of(version: int, phase: str = "interrupted") -> TrainingState:
    return TrainingState(
        run_id="first | try",
        phase=phase,
        version=version,
        num_updates=9,
        optimizer_steps=2 * version,
        prompts=8 * version,
        completions=32 * version,
        tokens=100 * version,
        seed=0,
        staleness_max=1,
    )


def trained(start: Path, config: Config, version: int) -> PreTrainedModel:
    """What training made of the start: other numbers, in float32, adapters where the config has them."""
    model = load_policy(start)
    add_adapters(model, config.learner.lora, config.seed)
    source = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for _, parameter in trained_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=source) * 0.1)
    return model


def make_checkpoint(run: Path, model: PreTrainedModel, config: Config, version: int, num_ranks: int = 2) -> Path:
    """As `num_ranks` ranks write it."""
    folder, files = folder_of(run, version), {}
    facts = LearnerFacts(
        format=FORMAT,
        version=version,
        num_ranks=num_ranks,
        zero_stage=2,
        precision=config.learner.precision,
        optimizer_steps=2 * version,
        model_steps={"policy": 2 * version},
        lora=config.learner.lora.identity,
    )
    parameters = list(trained_parameters(model))
    for rank in range(num_ranks):
        names = file_names(num_ranks, rank, ["policy"])
        share = {
            f"{kind}/{n}": p.detach() if kind == MASTER else p.detach() * 0
            for n, p in parameters[rank::num_ranks]
            for kind in (MASTER, *MOMENTS)
        }
        contents = {names["rank"]: {}, names["policy"]: share, **({FACTS_NAME: asdict(facts)} if rank == 0 else {})}
        writer = CheckpointWriter()
        writer.start(folder, contents)
        files |= writer.finish()
    commit(folder, state_of(version, "training"), Mark(segment=0, offset=0, digest=""), files)
    return folder

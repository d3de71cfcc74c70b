"""Architectures through the whole loop, on the real vLLM and DeepSpeed: what is sampled is what is trained is what is exported."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from async_rlhf.commands.export import run_export
from tests.support.cluster import make_model_folder
from tests.support.command import rows_of, run_cli
from tests.support.tiny_policy import logprobs_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

COMMON = (
    *("conf/quickstart.yaml", "updates=3", "max_staleness=0", "batch_groups=8", "completions_per_prompt=4", "queue.ties=keep"),
    *("task.held_out=20", "generator.temperature=0.8", "checkpoint.every_updates=2"),
    *("learner.learning_rate=1e-3", "learner.warmup_steps=0"),
)

REWARD = """
def score(prompts, completions, **columns):
    return [float(sum(character in "13579" for character in text)) for text in completions]
"""
"""What a random model can learn: odd digits."""

RUNS = {
    "gpt_neox": ("gpt_neox", False, ("algorithm=ppo", "learner.zero_stage=3")),
    "gemma": ("gemma", True, ("algorithm=rloo", "learner.batching=padded")),
    "qwen3, tied, adapters": ("qwen3", True, ("algorithm=dpo", "learner.lora.rank=4", "learner.lora.alpha=8", "learner.zero_stage=2")),
    "llama, adapters published alone": (
        "llama",
        False,
        ("algorithm=rloo", "learner.zero_stage=3", "learner.lora.rank=4", "learner.lora.publish=adapter"),
    ),
}


@pytest.mark.parametrize("case", [*list(RUNS)[:2], *(pytest.param(case, marks=pytest.mark.long) for case in list(RUNS)[2:])])
def test_a_family_is_sampled_trained_and_exported_alike(tmp_path: Path, case: str) -> None:
    family, tied, settings = RUNS[case]
    start, run = make_model_folder(tmp_path / "start", family=family, tied=tied), tmp_path / "run"

    (tmp_path / "odd.py").write_text(REWARD)

    done = run_cli("train", *COMMON, *settings, f"model.path={start}", f"run.dir={run}", f"reward.function={tmp_path / 'odd.py'}:score")

    assert done.code == 0, done.output
    rows = rows_of(run)
    assert len(rows) == 3
    assert max(row["weights/canary_error_nats"] for row in rows) < 1e-3
    # Every batch was sampled by the very version that trains it; the first one by the reference.
    assert max(abs(row["mismatch/kl_k3_nats"]) for row in rows) < 1e-6
    assert abs(rows[0]["policy/kl_k3_nats"]) < 1e-6 < rows[2]["policy/kl_k3_nats"]
    assert_export_is_what_was_trained(run, start)
    if "adapters" in case:
        assert_adapters_on_the_base_are_the_merged_model(run, start)


def assert_export_is_what_was_trained(run: Path, start: Path) -> None:
    model, base = AutoModelForCausalLM.from_pretrained(run / "model"), AutoModelForCausalLM.from_pretrained(start)
    run_export(run, None, 3, False, Console(quiet=True))
    run_export(run, run / "early", 2, False, Console(quiet=True))
    by_checkpoint = AutoModelForCausalLM.from_pretrained(run / "export" / "00000003")
    for (name, parameter), other in zip(model.named_parameters(), by_checkpoint.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert any(not torch.equal(parameter, model.get_parameter(name)) for name, parameter in base.named_parameters())
    assert "| updates | 3 of 3 (" in (run / "model" / "README.md").read_text()
    settings = GenerationConfig.from_pretrained(run / "model")
    assert (settings.temperature, settings.do_sample, settings.top_k, settings.top_p, settings.eos_token_id) == (0.8, True, 0, 1.0, 1)
    assert AutoTokenizer.from_pretrained(run / "early").encode("1+2=") == AutoTokenizer.from_pretrained(start).encode("1+2=")
    # What the exported checkpoint says of the tokens that version 2 sampled is what vLLM recorded when it sampled them.
    assert recorded_by(run, version=2, model=AutoModelForCausalLM.from_pretrained(run / "early"))


def recorded_by(run: Path, version: int, model: torch.nn.Module) -> int:
    """Checks the completions that `version` alone sampled; returns how many."""
    rows = load_dataset("parquet", data_files=str(run / "rollouts" / "*.parquet"), split="train", cache_dir=str(run / "cache"))
    own = [row for row in rows if {span["version"] for span in row["version_spans"]} == {version}]
    for row in own:
        expected = logprobs_of(model, row["prompt_ids"], row["completion_ids"], 0.8)  # type: ignore[arg-type]
        np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-3)
    return len(own)


def assert_adapters_on_the_base_are_the_merged_model(run: Path, start: Path) -> None:
    done = run_cli("export", str(run), "--adapter", "--out", str(run / "adapter"))
    assert done.code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), str(run / "adapter"))
    ids = torch.tensor([[4, 5, 13, 6, 17]])

    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=0)
    checkpoint = next((run / "checkpoints" / "00000003" / "learner").glob("policy-*.safetensors"))
    with safe_open(checkpoint, framework="pt") as tensors:
        assert all(".lora_" in key for key in tensors.keys())  # noqa: SIM118  # safetensors' object is no mapping
    assert os.path.getsize(run / "adapter" / "adapter_model.safetensors") < os.path.getsize(run / "model" / "model.safetensors")

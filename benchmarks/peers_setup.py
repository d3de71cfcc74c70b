"""What both sides of peers.py are given: model folders with the lengths in their heads, prompts, problems."""

import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 1021
NUM_PROMPTS, MIN_WORDS, MAX_WORDS = 520, 8, 24
CONSTANT = 20.0
"""Of the embeddings' first channel, on which the head's end-of-sequence row stands."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    metric: str
    group: int
    """Completions per prompt; TRL's online DPO knows 2 alone."""


@dataclass(frozen=True, slots=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_cache_mib: int
    """Room for 128 completions in flight."""


@dataclass(frozen=True, slots=True)
class Lengths:
    limit: int
    """Longest completion, tokens."""
    end_probability: float
    """Of each token to be the last one."""


ALGORITHMS = {"rloo": Algorithm("rloo", 4), "grpo": Algorithm("grpo", 4), "dpo": Algorithm("online_dpo", 2)}
SIZES = {"1m": Size(128, 384, 4, 4, 128), "10m": Size(320, 960, 7, 5, 384), "50m": Size(640, 1920, 9, 10, 768)}
LENGTHS = {"long": Lengths(192, 1 / 32), "fixed": Lengths(32, 1e-9)}


def make_model(folder: Path, size: str, lengths: str) -> Path:
    """A Llama with random weights whose completions have these lengths, under any sampler.

    The first channel of every embedding is one large number, so it is nearly the same after the final norm too; the head's row of the
    end-of-sequence token reads that channel alone, which makes its probability the wanted one after any text.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from async_rlhf.config.schema import ModelConfig
    from async_rlhf.tasks.base import Vocabulary
    from async_rlhf.tasks.start import build_policy, build_tokenizer

    target = folder / f"{size}-{lengths}"
    if target.is_dir():
        return target
    disable_progress_bar()
    shape, wanted = SIZES[size], LENGTHS[lengths].end_probability
    tokenizer = build_tokenizer(Vocabulary(tokens=words(), separator=" "))
    config = ModelConfig(hidden_size=shape.hidden, num_layers=shape.layers, num_heads=shape.heads, intermediate_size=shape.intermediate)
    model = build_policy(config, tokenizer, seed=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = CONSTANT
        ids = torch.randint(3, len(tokenizer), (8, 64), generator=torch.Generator().manual_seed(0))
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
        head = model.get_output_embeddings().weight
        head[:, 0] = 0.0
        head[tokenizer.eos_token_id] = 0.0
        # Padding and the unknown token are never sampled: their texts would not be read back as the same tokens.
        for token in (tokenizer.pad_token_id, tokenizer.unk_token_id):
            head[token] = 0.0
            head[token, 0] = -30.0 / hidden[..., 0].mean()
        others = torch.logsumexp(model(input_ids=ids).logits, dim=-1).exp().mean() - 1.0
        head[tokenizer.eos_token_id, 0] = math.log(wanted / (1 - wanted) * others) / hidden[..., 0].mean()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def words() -> tuple[str, ...]:
    """The vocabulary, special tokens apart."""
    return tuple(f"w{number:04d}" for number in range(VOCABULARY))


def make_prompts(folder: Path) -> Path:
    """Rows {"prompt"} of random words."""
    file, rng = folder / "prompts.jsonl", random.Random(0)
    if not file.is_file():
        texts = (" ".join(rng.choices(words(), k=rng.randint(MIN_WORDS, MAX_WORDS))) for _ in range(NUM_PROMPTS))
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def make_start() -> Path:
    """The quickstart's supervised start; `async-rlhf sft` makes it where it is not in the cache."""
    from async_rlhf.config import load_config
    from async_rlhf.sft import cached_start, start_folder

    config = load_config(["conf/quickstart.yaml"]).config
    if cached_start(config) is None:
        subprocess.run([sys.executable, "-m", "async_rlhf", "sft", "conf/quickstart.yaml"], check=True)
    return start_folder(config)


def make_problems(folder: Path) -> dict[str, str]:
    """The arithmetic task's training and held-out problems as files of {"prompt", "answer"}."""
    from async_rlhf.config import load_config
    from async_rlhf.tasks import load_task

    task = load_task(load_config(["conf/quickstart.yaml"]).config.task)
    problems = {"prompts": [task.problem(index) for index in range(task.num_problems)], "held_out": list(task.held_out())}
    files: dict[str, str] = {}
    for name, of_name in problems.items():
        file = folder / f"arithmetic-{name}.jsonl"
        rows = (json.dumps({"prompt": problem.text, "answer": problem.columns["answer"]}) for problem in of_name)
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
        files[name] = str(file)
    return files

"""TRL's side of peers.py: one training run by the Python of TRL's own environment, and the reward that both sides use.

    python benchmarks/peers_trl.py SETTINGS.json

Prints a JSON line after each update: {"update": 3, "time_s": 1.5, "length_tokens": 31.2}, and where accuracy is measured {"accuracy": ...}.
The clock stands still while accuracy is measured. Nothing of async_rlhf is imported: that environment does not have it.
"""

import json
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def score(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A number in [0, 1) that looks random: no two completions tie, and it costs nothing."""
    del prompts, columns
    return [zlib.crc32(completion.encode()) / 2**32 for completion in completions]


def exact(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **columns: Any) -> list[float]:
    """1 for the answer, character for character, else 0: the arithmetic task's rule."""
    del prompts, columns
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def train(settings: dict[str, Any]) -> None:
    """One run; see `common` for what the settings mean."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    rows = load_dataset("json", data_files=settings["prompts"], split="train")
    lengths: list[int] = []

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.extend(sum(token != tokenizer.pad_token_id for token in ids) for ids in completion_ids)
        return globals()[settings["reward"]](prompts, completions, **columns)

    watch = make_watch(settings, tokenizer, lengths)
    given: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer, "reward_funcs": reward, "callbacks": [watch]}
    arguments, sampled = common(settings), {"temperature": 1.0}
    if settings["algorithm"] == "dpo":
        config = OnlineDPOConfig(**arguments, **sampled, max_new_tokens=settings["max_new_tokens"], max_length=512, beta=[0.1])
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(settings["model"])
        trainer: Any = OnlineDPOTrainer(model=model, args=config, **given)
    else:
        sampled |= {"num_generations": settings["group"], "max_completion_length": settings["max_new_tokens"]}
        sampled |= {
            "steps_per_generation": settings["steps_per_generation"],
            "use_transformers_continuous_batching": settings["continuous"],
        }
        if settings["continuous"]:
            # By default its cache takes half of the memory, and is made anew in each call.
            sampled |= {"transformers_continuous_batching_config": {"page_size": 32, "num_blocks": 256, "max_batch_tokens": 64}}
        if settings["algorithm"] == "rloo":
            trainer = RLOOTrainer(model=settings["model"], args=RLOOConfig(**arguments, **sampled, beta=0.05), **given)
        else:
            sampled |= {"epsilon_high": 0.28, "beta": 0.0}
            trainer = GRPOTrainer(model=settings["model"], args=GRPOConfig(**arguments, **sampled), **given)
    trainer.train()


def common(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments that all trainers share.

    Of the settings, `microbatch` counts completions per process and pass (for online DPO they are sampled so many at a time, too),
    `steps_per_generation` how many such passes share one call of generate.
    """
    per_update = settings["completions"] // settings["processes"]
    in_rows = 2 if settings["algorithm"] == "dpo" else 1
    return {
        "output_dir": str(Path(settings["prompts"]).parent / "trl"),
        "max_steps": settings["updates"],
        "per_device_train_batch_size": settings["microbatch"] // in_rows,
        "gradient_accumulation_steps": per_update // settings["microbatch"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": settings["warmup_steps"],
        "adam_beta2": 0.99,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": settings["bf16"],
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": settings["seed"],
    }


def make_watch(settings: dict[str, Any], tokenizer: Any, lengths: list[int]) -> Any:
    """The callback that tells the time after each update, and the accuracy where it is asked for."""
    from accelerate.utils import broadcast_object_list
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        paused_s = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
            time_s = time.perf_counter() - self.began - self.paused_s
            row = {"update": state.global_step, "time_s": time_s, "length_tokens": sum(lengths) / max(1, len(lengths))}
            lengths.clear()
            every = settings.get("evaluate_every", 0)
            if every and state.global_step % every == 0:
                found = [accuracy(model, tokenizer, settings["held_out"]) if state.is_world_process_zero else None]
                [row["accuracy"]] = broadcast_object_list(found)  # all processes stop, or none: one alone would wait for ever
                control.should_training_stop = row["accuracy"] >= settings["target"]
            if state.is_world_process_zero:
                print(json.dumps(row), flush=True)
            self.paused_s = time.perf_counter() - self.began - time_s

    return Watch()


def accuracy(model: Any, tokenizer: Any, held_out: str) -> float:
    """Share of the held-out problems that the greedy answer solves."""
    import torch

    model = getattr(model, "module", model)
    rows = [json.loads(line) for line in Path(held_out).read_text(encoding="utf-8").splitlines()]
    given = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left")
    training = model.training
    model.eval()
    with torch.no_grad():
        ids = model.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], do_sample=False, max_new_tokens=8, use_cache=True
        )
    model.train(training)
    texts = tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text == row["answer"] for text, row in zip(texts, rows, strict=True)) / len(rows)


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

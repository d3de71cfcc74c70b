"""`async-rlhf generate`: what a finished policy answers to prompts of yours."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from async_rlhf.commands.sampling import engine_of, policy_of, prepare_process, sample
from async_rlhf.commands.say import say
from async_rlhf.config import Config
from async_rlhf.errors import ConfigError
from async_rlhf.prompts.encoding import PromptTokenizer
from async_rlhf.state import write_atomically
from async_rlhf.types import Prompt, Rollout

STDIN = Path("-")


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What is asked, and how."""

    prompts: tuple[str, ...]
    file: Path | None = None
    """More prompts, one per line; `-`: standard input."""
    chat: bool = False
    """Each prompt is a user's turn, written by the tokenizer's chat template."""
    num_samples: int = 1
    """Completions of each prompt."""
    temperature: float | None = None
    """None: the config's; 0: greedy."""

    def texts(self) -> list[str]:
        """All prompts, in order.

        Raises:
            ConfigError: there are none, or the file cannot be read.
        """
        found = list(self.prompts)
        if self.file is not None:
            try:
                text = sys.stdin.read() if self.file == STDIN else self.file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--prompts {self.file} cannot be read as lines of text: {error}") from error
            found += [line for line in text.splitlines() if line.strip()]
        if not found:
            raise ConfigError(
                "nothing is asked: give --prompt TEXT (again for more), or --prompts FILE with one per line (- for standard input)"
            )
        return found


def run_generate(model: Path, words: list[str], questions: Questions, out: Path | None, console: Console) -> None:
    """Sample and print completions; with `out`, write them as JSON lines with tokens and log-probabilities.

    Args:
        model: a Hugging Face folder, or the folder of a finished run.
        words: config files and overrides, as for `train`.
    Raises:
        ConfigError: no model there, nothing asked, a prompt too long, or a wrong setting.
    """
    policy = policy_of(model, words)
    prompts = encoded(questions, policy.folder, policy.config)
    temperature = policy.config.generator.temperature if questions.temperature is None else questions.temperature
    prepare_process()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy.folder)
    with engine_of(policy.config, policy.folder) as generator:
        rollouts = sample(generator, prompts, temperature, console)
    texts = tokenizer.batch_decode([rollout.completion_ids.tolist() for rollout in rollouts], skip_special_tokens=True)
    if out is None:
        say(console, *(f"{prompt.text}{text}" for prompt, text in zip(prompts, texts, strict=True)))
    else:
        lines = (as_line(*each) for each in zip(prompts, rollouts, texts, strict=True))
        write_atomically(out.resolve(), "".join(f"{line}\n" for line in lines))
        say(console, f"written: {out} ({len(texts)} completions of {len(prompts) // questions.num_samples} prompts)")


def encoded(questions: Questions, folder: Path, config: Config) -> list[Prompt]:
    """Each prompt as often as completions of it are wanted; an id of its own gives each a random stream of its own.

    Raises:
        ConfigError: nothing asked, no chat template, or a prompt longer than the engine takes.
    """
    tokenizer, longest = PromptTokenizer(folder), config.generator.max_model_len - config.generator.max_new_tokens
    if questions.chat and not tokenizer.has_chat_template:
        raise ConfigError(f"--chat needs a tokenizer with a chat template, and that of {folder} has none; ask without --chat")
    prompts: list[Prompt] = []
    for number, text in enumerate(questions.texts()):
        shown, token_ids = tokenizer.render([{"role": "user", "content": text}]) if questions.chat else (text, tokenizer.encode(text))
        if not 0 < len(token_ids) <= longest:
            raise ConfigError(
                f"prompt {number + 1} ({shown[:40]!r}) has {len(token_ids)} tokens, expected 1 to {longest} "
                "(generator.max_model_len minus generator.max_new_tokens)"
            )
        ids = np.asarray(token_ids, dtype=np.int32)
        names = (f"{number}.{index}" for index in range(questions.num_samples))
        prompts += [Prompt(prompt_id=name, text=shown, token_ids=ids) for name in names]
    return prompts


def as_line(prompt: Prompt, rollout: Rollout, text: str) -> str:
    """A completion as JSON."""
    found: dict[str, str | int | Sequence[float] | Sequence[int]] = {
        "prompt": prompt.text,
        "completion": text,
        "finish_reason": rollout.finish_reason.value,
        "token_ids": rollout.completion_ids.tolist(),
        "logprobs": rollout.behavior_logprobs.tolist(),
    }
    return json.dumps(found)

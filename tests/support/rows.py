"""Sources of rows for tests: small files, tokenizers with and without a chat template, configs that read them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from async_rlhf.config import Config, load_config
from async_rlhf.prompts import PromptCursor, PromptStream, make_stream
from async_rlhf.tasks.start import build_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}({{ m['role'][0] }}-{{ m['content'] }}){% endfor %}{% if add_generation_prompt %}(=){% endif %}"
"""Made of characters that the built-in tokenizer knows, but for the role's letter."""


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """One line of JSON per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(begin: int, end: int) -> list[dict[str, Any]]:
    """Rows begin to end - 1, each with its number in its prompt and in a column."""
    return [{"prompt": f"{number}+0=", "number": number} for number in range(begin, end)]


def save_tokenizer(folder: Path, *, chat: bool = False) -> Path:
    """The built-in character tokenizer."""
    tokenizer = build_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def dataset_config(sources: Mapping[str, Mapping[str, object]], *overrides: str) -> Config:
    """A dataset task with these sources, nothing held out, a look at live ones in every draw."""
    words = [f"prompts.sources.{name}.{key}={value}" for name, source in sources.items() for key, value in source.items()]
    base = ("task.name=dataset", "prompts.held_out=0", "prompts.poll_s=1e-9", "model.path=/unused", "reward.function=a:b")
    return load_config(overrides=[*base, *words, *overrides]).config


def opened(config: Config, tokenizer: Path, cursor: PromptCursor | None = None) -> PromptStream:
    """The stream of a config."""
    return make_stream(config, tokenizer, cursor or PromptCursor(epoch=0, index=0))


def drawn(stream: PromptStream, count: int) -> list[tuple[str, int]]:
    """(prompt id, epoch) of the next draws, those that gave nothing left out."""
    draws = [stream.draw() for _ in range(count)]
    return [(prompt.prompt_id, epoch) for prompt, epoch in (draw for draw in draws if draw is not None)]

"""`async-rlhf config`: the resolved settings, each with its origin."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from rich.console import Console

from async_rlhf.commands.say import say
from async_rlhf.config import load_config
from async_rlhf.config.fields import named_section


def run_config(files: Sequence[str], overrides: Sequence[str], console: Console) -> None:
    """Print one line per setting: YAML, with the file or override that set it as a comment.

    Raises:
        ConfigError: see load_config.
    """
    loaded = load_config(files, overrides)
    for line, key in _lines(loaded.config):
        origin = loaded.origins.get(key, "") if key else ""
        text = f"{line:<46} # {origin}" if origin else line
        say(console, text)


def _lines(section: Any, prefix: str = "", indent: str = "") -> Iterator[tuple[str, str]]:
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield f"{indent}{item.name}:", ""
            yield from _lines(value, f"{prefix}{item.name}.", indent + "  ")
        elif named_section(item.type) and value:
            yield f"{indent}{item.name}:", ""
            for name, section_of_name in value.items():
                yield f"{indent}  {name}:", ""
                yield from _lines(section_of_name, f"{prefix}{item.name}.{name}.", indent + "    ")
        else:
            yield f"{indent}{item.name}: {_yaml(value)}", f"{prefix}{item.name}"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value or '""'
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Configs from overrides, and the words with which one is refused."""

import dataclasses
from typing import Any

import pytest

from async_rlhf.config import Config, load_config
from async_rlhf.config.fields import named_section
from async_rlhf.errors import ConfigError


def load(*overrides: str) -> Config:
    """The checked config of the defaults and these overrides."""
    return load_config(overrides=overrides).config


def refusal(*overrides: str) -> str:
    """The message of the ConfigError that these overrides raise."""
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


def with_value(section: Any, key: str, value: Any) -> Any:
    """A copy of the config (or section) with one setting changed, unchecked; a section that the key names is made where it is not there."""
    head, _, rest = key.partition(".")
    if not rest:
        return dataclasses.replace(section, **{head: value})
    named = named_section(next(item.type for item in dataclasses.fields(section) if item.name == head))
    if named:
        name, _, rest = rest.partition(".")
        sections = getattr(section, head)
        return dataclasses.replace(section, **{head: {**sections, name: with_value(sections.get(name, named()), rest, value)}})
    return dataclasses.replace(section, **{head: with_value(getattr(section, head), rest, value)})

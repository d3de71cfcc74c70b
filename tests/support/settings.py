"""Configs from overrides, and the words with which one is refused."""

import dataclasses
from typing import Any

import pytest

from async_rlhf.config import Config, load_config
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
    """A copy of the config (or section) with one setting changed, unchecked."""
    head, _, rest = key.partition(".")
    return dataclasses.replace(section, **{head: with_value(getattr(section, head), rest, value) if rest else value})

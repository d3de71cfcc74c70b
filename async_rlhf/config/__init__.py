"""Configuration: schema (defaults, ranges), load (merge, origins) and checks (ranges, contradictions)."""

from async_rlhf.config.load import LoadedConfig, load_config, to_yaml
from async_rlhf.config.schema import Config

__all__ = ["Config", "LoadedConfig", "load_config", "to_yaml"]

"""Models by name: a folder as it is, or a hub id, fetched once into the hub's cache."""

# pyright: reportUnknownMemberType=false

import os
import re
from dataclasses import replace
from pathlib import Path

from async_rlhf.config import Config
from async_rlhf.errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
"""`owner/name`, with a branch, tag or commit behind an @ where it is not the main one."""

WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""Weights, configs, tokenizers and chat templates; no pickles, no code."""


def model_folder(key: str, path: str) -> Path:
    """The absolute folder of a model: `path` itself, or where the hub's cache has it, downloaded if need be.

    Args:
        key: the setting, for messages.
        path: a folder, or a hub id `owner/name` or `owner/name@revision`.
    Raises:
        ConfigError: no such folder, and no hub id that can be had.
    """
    folder = Path(path).expanduser()
    if folder.exists() or not HUB_ID.fullmatch(path):
        return folder.resolve()
    from huggingface_hub import snapshot_download

    name, _, revision = path.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED)))
    except Exception as error:  # whatever a network, a hub or its cache says
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE forbids to ask the hub, and its cache has no copy" if offline else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{key} {path} is no folder here, and as a hub id it cannot be had: {why.splitlines()[0]}; fetch it where there is a network "
            f"with `hf download {name}`, or give a folder"
        ) from None


def with_local_models(config: Config) -> Config:
    """The config with the folder of each model that it names, absolute: the actors run elsewhere, and ask no hub.

    Raises:
        ConfigError: see model_folder.
    """

    def local(key: str, path: str) -> str:
        return str(model_folder(key, path)) if path else ""

    ppo = config.algorithm.ppo
    critic = replace(ppo.critic, path=local("algorithm.ppo.critic.path", ppo.critic.path))
    parts = {name: replace(part, path=local(f"reward.parts.{name}.path", part.path)) for name, part in config.reward.parts.items()}
    return replace(
        config,
        model=replace(config.model, path=local("model.path", config.model.path)),
        algorithm=replace(config.algorithm, ppo=replace(ppo, critic=critic)),
        reward=replace(config.reward, parts=parts),
        reward_model=replace(config.reward_model, path=local("reward_model.path", config.reward_model.path)),
        evaluation=replace(config.evaluation, against=local("evaluation.against", config.evaluation.against)),
    )

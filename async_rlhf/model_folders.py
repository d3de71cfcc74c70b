"""Hugging Face model folders, checked before any work starts."""

import json
from pathlib import Path
from typing import Any, cast

from async_rlhf.errors import ConfigError

_CRITIC = "algorithm.ppo.critic.path"


def check_model_folder(folder: Path) -> None:
    """Raise ConfigError unless `folder` holds a Hugging Face model whose tokenizer has an end-of-sequence token."""
    remedy = "set model.path to a folder made by save_pretrained, or leave it empty for the task's own start"
    _check_files("model.path", folder, remedy)
    architecture = _architecture(_read(folder / "config.json", "save_pretrained"))
    if architecture.endswith("ForSequenceClassification"):
        raise ConfigError(f"model.path must hold a language model, got {architecture}, which has no language-model head; {remedy}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")):
        raise ConfigError(f"model.path {folder} holds no tokenizer; save it there with tokenizer.save_pretrained")
    file = folder / "tokenizer_config.json"
    settings = _read(file, "tokenizer.save_pretrained") if file.is_file() else {}
    if not settings.get("eos_token"):
        raise ConfigError(
            f"the tokenizer in {folder} has no end-of-sequence token (eos_token in tokenizer_config.json); "
            "completions could never end: set tokenizer.eos_token and save it again"
        )
    _check_vocabulary(folder, settings)


def check_critic_folder(folder: Path) -> None:
    """Raise ConfigError unless `folder` holds a language model, or a reward model with one label."""
    _check_files(
        _CRITIC, folder, f"set {_CRITIC} to a reward model's, a critic's or a policy's folder, or leave it empty to start from the policy"
    )
    own = _read(folder / "config.json", "save_pretrained")
    num_labels = len(own.get("id2label") or {0: 0, 1: 1})  # transformers leaves two labels, its default, out of the file
    if _architecture(own).endswith("ForSequenceClassification") and num_labels != 1:
        raise ConfigError(f"{_CRITIC} {folder} must score a text with one label, got {num_labels}; train it with num_labels=1")


def check_critic_vocabulary(critic_folder: Path, policy_folder: Path) -> None:
    """Raise ConfigError unless the critic reads all of the policy's tokens; it may know more (a padding token, for instance)."""
    own, policy = (_read(folder / "config.json", "save_pretrained") for folder in (critic_folder, policy_folder))
    sizes = [int(settings.get("vocab_size") or 0) for settings in (own, policy)]
    if sizes[0] < sizes[1]:
        raise ConfigError(
            f"{_CRITIC} {critic_folder} reads another vocabulary ({sizes[0]} tokens) than the policy ({sizes[1]}); "
            "a critic reads the policy's own tokens: train it on the same tokenizer"
        )


def _check_vocabulary(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError unless the embedding has a row for every token that texts can bring.

    Added special tokens that neither the chat template nor the tokenizer's settings name may go without: some families share one
    tokenizer among models of which only some see images.
    """
    own = _read(folder / "config.json", "save_pretrained")
    rows = own.get("vocab_size") or (own.get("text_config") or {}).get("vocab_size")
    if not rows or not (folder / "tokenizer.json").is_file():
        return
    tokenizer = _read(folder / "tokenizer.json", "tokenizer.save_pretrained")
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {str(piece[0]): index for index, piece in enumerate(vocabulary)}
    template = folder / "chat_template.jinja"
    named = f"{json.dumps(settings)}{template.read_text(encoding='utf-8') if template.is_file() else ''}"
    named = named.replace(json.dumps(settings.get("added_tokens_decoder")), "").replace(
        json.dumps(settings.get("extra_special_tokens")), ""
    )
    for token in tokenizer.get("added_tokens") or ():
        if not token.get("special") or token["content"] in named:
            ids[token["content"]] = token["id"]
    if ids and (largest := max(ids.items(), key=lambda entry: entry[1]))[1] >= rows:
        raise ConfigError(
            f"model.path {folder} must have a row of its embedding for every token, but it has {rows} rows and the tokenizer gives "
            f"{largest[0]!r} the number {largest[1]}: they do not belong together; save the model's own tokenizer there, or enlarge the "
            "embedding with model.resize_token_embeddings(len(tokenizer))"
        )


def _architecture(settings: dict[str, Any]) -> str:
    return str(next(iter(settings.get("architectures") or ["?"])))


def _check_files(key: str, folder: Path, remedy: str) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{key} must be a folder with a Hugging Face model, got {folder}, which does not exist; {remedy}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key} {folder} holds no config.json; {remedy}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{key} {folder} holds no *.safetensors weights; {remedy}")


def _read(file: Path, writer: str) -> dict[str, Any]:
    try:
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}; save it again with {writer}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(settings).__name__}; save it again with {writer}")
    return cast(dict[str, Any], settings)

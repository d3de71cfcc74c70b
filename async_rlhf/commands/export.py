"""`async-rlhf export`: a policy of a run as a folder to give away, from any checkpoint, also while the run goes on.

Reads JSON, YAML and safetensors alone, and starts neither Ray nor DeepSpeed: the run folder of a stranger is safe to export.
"""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from async_rlhf.checkpoints import Checkpoint, newest
from async_rlhf.commands.resume import read_origin
from async_rlhf.commands.say import say
from async_rlhf.config import Config, load_config
from async_rlhf.config.lora import LoraConfig
from async_rlhf.errors import ConfigError
from async_rlhf.files import whole_folder
from async_rlhf.model_card import CARD, hub_id, model_card
from async_rlhf.model_folders import check_model_folder
from async_rlhf.state import read_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_export(run: Path, out: Path | None, version: int | None, adapter: bool, console: Console) -> None:
    """Write the folder, whole or not at all, and say where it is.

    Args:
        run: a run folder.
        out: must not exist, or be empty; None: RUN/export/<version>.
        version: of a checkpoint; None: the finished run's model, else the newest whole checkpoint.
        adapter: the adapters of a LoRA run alone, as PEFT reads them, instead of the merged model.
    Raises:
        ConfigError: no run, no such checkpoint, no adapters, no base model, or the folder is taken.
    """
    run = run.resolve()
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is no run folder: it has no config.yaml; give the folder that `train` printed")
    config = load_config([run / "config.yaml"]).config
    base = Path(read_origin(run)["model_folder"])
    state = read_state(run)
    # A run that was resumed for more updates holds the model of its earlier end until it is finished again.
    finished = version is None and not adapter and state.phase == "finished" and (run / "model" / "config.json").is_file()
    checkpoint = None if finished else _checkpoint(run, version)
    state = state if checkpoint is None else checkpoint.state
    folder = _free(out.resolve() if out is not None else run / "export" / f"{state.version:08d}{'-adapter' if adapter else ''}")
    policy = None if checkpoint is None else _load(checkpoint, config, base, adapter)
    with _written(folder) as made:
        if policy is None:
            shutil.copytree(run / "model", made, dirs_exist_ok=True)
        else:
            policy.save(made, base, config.generator.temperature)
        (made / CARD).write_text(model_card(run, config, state, base=base, adapter=adapter), encoding="utf-8")
    where = f"checkpoint of version {state.version}" if checkpoint is not None else f"finished run, version {state.version}"
    say(console, f"exported: {folder} ({where})")


def _checkpoint(run: Path, version: int | None) -> Checkpoint:
    checkpoint, skipped = newest(run, version)
    if checkpoint is None:
        damaged = f" ({'; '.join(skipped)})" if skipped else ""
        raise ConfigError(f"{run} has no whole checkpoint{damaged}; export when the run has made one (checkpoint.every_updates)")
    return checkpoint


def _free(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"the folder of an export must not exist or be empty, got {folder}; delete it, or name another one by --out")
    return folder


@contextmanager
def _written(folder: Path) -> Generator[Path]:
    try:
        with whole_folder(folder) as made:
            yield made
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}; name another folder by --out") from error


@dataclass(frozen=True, kw_only=True)
class _Policy:
    """A checkpoint's weights in the base model, to be written with or without it."""

    model: "PreTrainedModel"
    lora: LoraConfig
    adapter: bool

    def save(self, folder: Path, base: Path, temperature: float) -> None:
        from async_rlhf.adapters import plain_parts, save_adapters, trained_parameters
        from async_rlhf.export import save_policy, save_tokenizer

        if self.adapter:
            adapters = {name: parameter.detach() for name, parameter in trained_parameters(self.model)}
            save_adapters(adapters, self.lora, folder, hub_id(base))
            save_tokenizer(base, folder)
        else:
            weights = {part.name: part.merged().detach().to(part.weight.dtype) for part in plain_parts(self.model)}
            save_policy(self.model, weights, folder, start=base, temperature=temperature)


def _load(checkpoint: Checkpoint, config: Config, base: Path, adapter: bool) -> _Policy:
    """
    Raises:
        ConfigError: there are no adapters, no base model, or it is another one.
    """
    os.environ.setdefault("DS_LOG_LEVEL", "error")  # libraries import DeepSpeed where they find it, and it says that there is no GPU
    import torch

    from async_rlhf.adapters import add_adapters, trained_parameters
    from async_rlhf.policy import load_policy
    from async_rlhf.snapshot import DTYPES
    from learners.checkpoint import MASTER, SavedLearner

    saved = SavedLearner(checkpoint.folder)
    lora = LoraConfig(**saved.facts.lora)
    if adapter and not lora.rank:
        raise ConfigError(f"{checkpoint.folder} holds a whole model, no adapters (learner.lora.rank is 0); export it without --adapter")
    if not base.is_dir():
        raise ConfigError(
            f"the run began from {base}, which does not exist; a checkpoint needs its config and tokenizer, and adapters its weights: "
            "restore it, or say where it is in the run's origin.json"
        )
    check_model_folder(base)
    model = load_policy(base, DTYPES[saved.facts.precision])
    add_adapters(model, lora, config.seed)
    trained = dict(trained_parameters(model))
    state = saved.model("policy", {name: tuple(parameter.shape) for name, parameter in trained.items()})
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state.read(f"{MASTER}/{name}"))
    return _Policy(model=model, lora=lora, adapter=adapter)

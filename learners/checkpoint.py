"""The learner's part of a checkpoint: files that any number of ranks, at any ZeRO stage, reads back bit by bit.

    learner/learner.json                       version, counters, who wrote it
    learner/policy-00000-of-00002.safetensors  rank 0's share of the policy's state (see engine_state); one file per rank
    learner/critic-00000-of-00002.safetensors  the critic's, where there is one
    learner/rank-00000-of-00002.json           rank 0's random number generators

Nothing here says whether a checkpoint is complete: whoever had it written knows that, from what each rank's `finish` returned.
"""

import json
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from async_rlhf.config.lora import LoraConfig
from async_rlhf.errors import ConfigError, RunError
from async_rlhf.files import sync_folder

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means of gradient and squared gradient, by torch's names."""

FORMAT = 1
"""Raised when older code could not read the files any more."""

FileFacts = tuple[int, int]
"""Size in bytes and CRC-32 of a file."""


@dataclass(frozen=True, kw_only=True)
class LearnerFacts:
    """learner.json."""

    format: int
    version: int
    """Completed updates in the weights."""
    num_ranks: int
    """Ranks that wrote it."""
    zero_stage: int
    """At which it was written; for people, nothing depends on it."""
    precision: str
    """Likewise."""
    optimizer_steps: int
    model_steps: dict[str, int]
    """Model (`policy`, `critic`) -> optimizer steps behind it."""
    lora: dict[str, Any] = field(default_factory=lambda: LoraConfig().identity)
    """LoraConfig.identity of the adapters that were trained; with rank 0 the policy's own weights were."""


Content = Mapping[str, Tensor] | Mapping[str, Any]


def file_names(num_ranks: int, rank: int, models: Iterable[str]) -> dict[str, str]:
    """What rank `rank` writes of each model, and of its random numbers (`rank`): file names."""
    part = f"{rank:05d}-of-{num_ranks:05d}"
    return {"rank": f"learner/rank-{part}.json", **{model: f"learner/{model}-{part}.safetensors" for model in models}}


FACTS_NAME = "learner/learner.json"


# Writing


class CheckpointWriter:
    """Writes files in a thread of its own, one checkpoint at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writes: list[Future[dict[str, FileFacts]]] = []

    def settle(self) -> None:
        """Wait until nothing is being written; what failed is told by `finish`."""
        wait(self._writes)

    def start(self, folder: Path, files: Mapping[str, Content]) -> None:
        """Begin to write and return at once; nobody else may change the tensors.

        Args:
            files: name relative to `folder` -> tensors by key (`.safetensors`) or what JSON can say (`.json`).
        """
        self._writes.append(self._thread.submit(_write_files, folder, files))

    def finish(self) -> dict[str, FileFacts]:
        """Wait for what was started since the last call; name relative to its folder -> facts of each file, all on the disk.

        Raises:
            RunError: a file could not be written.
        """
        writes, self._writes = self._writes, []
        assert writes, "start() must come before finish()"
        return {name: facts for write in writes for name, facts in write.result().items()}


def _write_files(folder: Path, files: Mapping[str, Content]) -> dict[str, FileFacts]:
    path = folder
    try:
        facts: dict[str, FileFacts] = {}
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            facts[name] = _write(path, _tensor_bytes(content) if name.endswith(".safetensors") else _json_bytes(content))
        for parent in {(folder / name).parent for name in files}:
            sync_folder(parent)
        return facts
    except OSError as error:
        raise RunError(
            f"{path} of a checkpoint could not be written: {error}; the checkpoint is incomplete and the learner as it was: free "
            "space there, or mend its permissions, and save again"
        ) from error


def _write(path: Path, chunks: Iterable[memoryview]) -> FileFacts:
    size, crc = 0, 0
    with path.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            size, crc = size + chunk.nbytes, zlib.crc32(chunk, crc)
        stream.flush()
        os.fsync(stream.fileno())
    return size, crc


def _json_bytes(content: Content) -> Iterator[memoryview]:
    yield memoryview(json.dumps(content, indent=1).encode())


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The safetensors format: length of the header (u64), header (JSON, padded to 8 bytes), data. Its library cannot stream."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32, f"{key} is {tensor.dtype}"
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for tensor in tensors.values():
        yield tensor.contiguous().numpy().reshape(-1).view(np.uint8).data


# Reading


class SavedModel:
    """The state of one model, in the files of all ranks that wrote it."""

    def __init__(self, paths: Iterable[Path], shapes: Mapping[str, tuple[int, ...]], num_steps: int) -> None:
        """
        Args:
            shapes: of every parameter of the model that is to take the state.
        Raises:
            ConfigError: the files are missing or damaged, or hold another model.
        """
        self.num_steps = num_steps
        self._where: dict[str, Any] = {}
        paths = list(paths)
        for path in paths:
            self._open(path, shapes)
        expected = {f"{kind}/{name}" for name in shapes for kind in (MASTER, *MOMENTS)}
        if missing := sorted(expected - self._where.keys()):
            raise ConfigError(
                f"{paths[0].parent}: {len(missing)} of {len(expected)} tensors are missing in {', '.join(path.name for path in paths)}, "
                f"{missing[0]} for one; resume with the model that wrote the checkpoint, or from another one"
            )

    def read(self, key: str) -> Tensor:
        """The full tensor, fp32, on the CPU."""
        return self._where[key].get_tensor(key)

    def _open(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        _check_exists(path)
        try:
            opened = cast(Any, safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is damaged: {error}; expected a whole safetensors file: resume from another checkpoint") from error
        for key in opened.keys():  # noqa: SIM118  # safetensors' object is no mapping
            name, found = key.partition("/")[2], tuple(opened.get_slice(key).get_shape())
            if shapes.get(name) != found:
                wanted = f"has {list(shapes[name])}" if name in shapes else "does not exist"
                raise ConfigError(
                    f"{path}: {name} has shape {list(found)}, but {wanted} in the model that is to be trained; resume with the model "
                    "that wrote the checkpoint"
                )
            self._where[key] = opened


class SavedLearner:
    """The learner's part of a checkpoint, to be read on every rank."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ConfigError: learner.json is missing or damaged.
        """
        self._folder = folder
        path = folder / FACTS_NAME
        content = _read_json(path)
        if content.get("format") != FORMAT:
            raise ConfigError(f"{path}: format is {content.get('format')}, expected {FORMAT}; resume with the release that wrote it")
        try:
            self.facts = LearnerFacts(**content)
        except TypeError as error:
            raise ConfigError(f"{path} is damaged: {error}; resume from another checkpoint") from error

    def check_models(self, models: Collection[str], lora: LoraConfig) -> None:
        """
        Raises:
            ConfigError: it was not written for these models, or for other adapters.
        """
        if lora.identity != self.facts.lora:
            raise ConfigError(
                f"{self._folder / FACTS_NAME}: the checkpoint was written with learner.lora {self.facts.lora}, but is to be read with "
                f"{lora.identity}; resume with the same adapters (or start a new run from the exported model)"
            )
        if set(models) != set(self.facts.model_steps):
            raise ConfigError(
                f"{self._folder / FACTS_NAME}: the checkpoint holds {' and '.join(self.facts.model_steps)}, but algorithm.name trains "
                f"{' and '.join(models)}; resume with the algorithm that wrote it"
            )

    def model(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> SavedModel:
        """See SavedModel."""
        ranks = range(self.facts.num_ranks)
        paths = [self._folder / file_names(self.facts.num_ranks, rank, [name])[name] for rank in ranks]
        return SavedModel(paths, shapes, self.facts.model_steps[name])

    def random_state(self, rank: int) -> Mapping[str, Any]:
        """What set_random_state takes, for rank `rank`: that of the rank which wrote in its place; those of more ranks start again at 0.

        Raises:
            ConfigError: the file of any rank is missing, or this one's is damaged.
        """
        paths = [self._folder / file_names(self.facts.num_ranks, writer, [])["rank"] for writer in range(self.facts.num_ranks)]
        for path in paths:
            _check_exists(path)
        return _read_json(paths[rank % len(paths)])


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path} of the checkpoint does not exist; resume from a complete checkpoint, all files of which are there")


def _read_json(path: Path) -> dict[str, Any]:
    _check_exists(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; resume from another checkpoint") from error

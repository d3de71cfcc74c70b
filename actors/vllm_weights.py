"""All calls into vLLM's update API, which changes between releases; tests/actors/test_vllm_api.py fails when it does.

Three ways into the workers, one way to load. A version comes as arrays (the only worker is this process), as a file without a name
(the workers are processes of their own, and read it from the memory of this node), or through a group of processes, straight from
the learner. Importing this imports vllm (seconds). Workers import it too (`worker_extension_cls`), and so know the transfer engine.
"""

import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.engine.llm_engine import LLMEngine

from actors.canary import PERTURBATION
from async_rlhf.checksums import bytes_of
from async_rlhf.types import Meeting, TensorSpec, WeightsManifest, WeightsVersion
from async_rlhf.weight_group import WeightGroup, dtype_of, num_bytes, receive

BACKEND = "async_rlhf"
"""vLLM's own `nccl` backend has no deadline, cannot be aborted, and needs vllm in the learner's process; ours runs on gloo too."""

TRANSFER = WeightTransferConfig(backend=BACKEND)


class WeightInstaller:
    """Mixed into vLLM's worker (`worker_extension_cls`), so that its methods can be called by name in the worker."""

    def install_weights(self, weights: WeightsVersion) -> None:
        """Load arrays through vLLM's own reload, which unpacks and repacks kernel layouts."""
        self._reload(named_tensors(weights))

    def install_file(self, path: str, manifest: WeightsManifest) -> None:
        """The same from a file that holds every tensor's bytes, one behind the other."""
        self._reload(_tensors_of_file(path, manifest.tensors))

    def _reload(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        worker: Any = self
        worker.reload_weights(weights_iterator=tensors)
        _repack_heads(worker.model_runner.get_model())


class EngineUpdates:
    """The engine's side: replaces the weights of all its workers between two steps. After any error the engine is unusable."""

    def __init__(self, engine: LLMEngine, num_workers: int, reread: bool) -> None:
        """
        Args:
            reread: what runs is read anew under new weights; otherwise its keys and values of earlier versions stay.
        """
        self._engine = engine
        self._num_workers = num_workers
        self._reread = reread
        self.num_installs = 0
        """What one of them has cached is not for another, though a version comes twice: the first, and after a lost history."""

    def install(self, weights: WeightsVersion) -> None:
        """Load a version that is here."""
        if self._num_workers == 1:
            self._engine.collective_rpc("install_weights", args=(weights,))
        else:
            with _NamelessFile(weights) as path:
                self._engine.collective_rpc("install_file", args=(path, weights.manifest))
        self.commit(weights.manifest.version)

    def meet(self, meeting: Meeting) -> None:
        """Let the workers meet the sender; whomever they met before, they leave."""
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": asdict(meeting)})

    def receive(self, manifest: WeightsManifest, noise: bool) -> None:
        """Load a version as the sender sends it.

        Args:
            noise: disturb it visibly, see the canary.
        """
        self._engine.collective_rpc("start_weight_update")
        self._engine.collective_rpc("update_weights", kwargs={"update_info": {"tensors": manifest.tensors, "noise": noise}})
        self._engine.collective_rpc("finish_weight_update")
        self.commit(manifest.version)

    def commit(self, version: int) -> None:
        """Every later token is sampled by the new policy; by it alone, where the running prefixes are computed again under it."""
        if self._reread:
            self._engine.reset_prefix_cache(reset_running_requests=True)
        self.num_installs += 1
        self._engine.set_weight_version(str(version))


@dataclass
class _Meets(WeightTransferInitInfo):
    """The fields of a Meeting, as vLLM hands them to each worker."""

    backend: Literal["nccl", "gloo"]
    address: str
    port: int
    key: str
    world_size: int
    timeout_s: float


@dataclass
class _Receives(WeightTransferUpdateInfo):
    """What a worker is told of one transfer."""

    tensors: Sequence[TensorSpec]
    noise: bool


class GroupWeights(WeightTransferEngine[_Meets, _Receives]):
    """The worker's side of a group: rank 0 is the learner, rank 1 + i is worker i."""

    init_info_cls = _Meets
    update_info_cls = _Receives
    _group: WeightGroup | None = None

    def init_transfer_engine(self, init_info: _Meets) -> None:
        """Meet the sender."""
        self.shutdown()
        self._group = WeightGroup(Meeting(**asdict(init_info)), 1 + self.parallel_config.rank, self.device)

    def start_weight_update(self) -> None:
        """Make the kernels' layouts plain again."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class does it, which fails where there is no accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: _Receives) -> None:
        """Load each tensor as soon as it is here."""
        assert self._group is not None, "init_transfer_engine comes first"
        tensors = receive(self._group, update_info.tensors, self.device)
        model: Any = self.model
        model.load_weights(_with_noise(tensors) if update_info.noise else tensors)

    def finish_weight_update(self) -> None:
        """Pack the kernels' layouts."""
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_heads(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.abort()
            self._group = None


WeightTransferEngineFactory.register_engine(BACKEND, GroupWeights)


def named_tensors(weights: WeightsVersion) -> Iterator[tuple[str, Tensor]]:
    """Torch views of a version's arrays, without a copy, in layer order."""
    with warnings.catch_warnings():
        # The arrays are read-only, shared with every generator of the node; nobody writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for spec in weights.manifest.tensors:
            tensor = torch.from_numpy(weights.tensors[spec.name])
            yield spec.name, tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor


class _NamelessFile:
    """A version's bytes in memory that other processes can open by path while this one holds it; nothing is left of it when it dies."""

    def __init__(self, weights: WeightsVersion) -> None:
        self._descriptor = os.memfd_create("async-rlhf-weights")
        for spec in weights.manifest.tensors:
            left = bytes_of(weights.tensors[spec.name])
            while left:
                left = left[os.write(self._descriptor, left) :]

    def __enter__(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _tensors_of_file(path: str, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed with the last tensor of it
        start = 0
        for spec in specs:
            size = num_bytes(spec)
            yield (
                spec.name,
                torch.frombuffer(mapped, dtype=dtype_of(spec), count=torch.Size(spec.shape).numel(), offset=start).view(spec.shape),
            )
            start += size


def _with_noise(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """As actors.canary.perturbed, on whatever device the tensors are; the same on every worker."""
    for index, (name, tensor) in enumerate(tensors):
        values = tensor.float()
        noise = torch.randn(values.shape, generator=_stream(index, tensor.device), device=tensor.device)
        yield name, (values + PERTURBATION * values.std(unbiased=False).clamp(min=1e-3) * noise).to(tensor.dtype)


def _stream(seed: int, device: torch.device) -> torch.Generator:
    stream = torch.Generator(device)
    stream.manual_seed(seed)
    return stream


def _repack_heads(model: torch.nn.Module) -> None:
    """On CPU the reload leaves a prepacked copy of a tied head stale."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)

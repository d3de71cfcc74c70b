"""Rank 0's end of the groups through which weights reach the generators: it sends what it held back, while the learner trains on."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from async_rlhf.errors import ConfigError
from async_rlhf.types import Meeting, WeightsManifest, WeightsVersion
from learners.rank import LearnerRank, open_store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from async_rlhf.weight_group import WeightGroup


@dataclass(frozen=True, kw_only=True)
class HeldVersion:
    """An immutable copy of the policy in the generators' dtype, on one device."""

    manifest: WeightsManifest
    tensors: "Sequence[Tensor]"
    """As in the manifest."""


class Sender:
    """Holds one version, and one group for each generator. Thread-safe: one thread holds, one meets and sends, one does the rest."""

    def __init__(self, backend: Literal["nccl", "gloo"], device: "torch.device", timeout_s: float) -> None:
        """
        Args:
            device: through which everything is sent.
            timeout_s: of a meeting, and of each lot of a transfer.
        """
        self._backend: Literal["nccl", "gloo"] = backend
        self._device = device
        self._timeout_s = timeout_s
        self._store: tuple[str, int, object] | None = None
        self._num_meetings = 0
        self._held: HeldVersion | None = None
        self._pins: dict[str, HeldVersion] = {}
        self._groups: dict[str, WeightGroup] = {}
        self._aborts: dict[str, threading.Event] = {}

    def hold(self, version: HeldVersion | None) -> None:
        """What pin() finds from now on; None: nothing. Begun transfers keep theirs."""
        self._held = version

    def pin(self, generator: str, version: int) -> bool:
        """Whether `version` is held; if so, it is what `generator` will be sent."""
        held = self._held
        if held is None or held.manifest.version != version:
            return False
        self._pins[generator] = held
        return True

    def open(self, generator: str, world_size: int) -> Meeting:
        """Where and how to meet a generator, once."""
        if self._store is None:
            self._store = open_store()
        address, port, _ = self._store
        self._num_meetings += 1
        self._aborts[generator] = threading.Event()
        return Meeting(
            backend=self._backend,
            address=address,
            port=port,
            key=f"{generator}/{self._num_meetings}",
            world_size=world_size,
            timeout_s=self._timeout_s,
        )

    def meet(self, generator: str, meeting: Meeting) -> None:
        """Wait for the generator's workers.

        Raises:
            TransferError: they did not come, or somebody gave up.
        """
        from async_rlhf.weight_group import WeightGroup

        self._groups[generator] = WeightGroup(meeting, 0, self._device, self._aborts[generator])

    def send(self, generator: str, num_rounds: int) -> None:
        """Send what was pinned, `num_rounds` times.

        Raises:
            TransferError: the generator died, or was too slow, or somebody gave up. Its group is of no more use.
        """
        import torch

        from async_rlhf.weight_group import send

        held = self._pins.pop(generator)
        with torch.cuda.stream(torch.cuda.Stream(self._device)) if self._device.type == "cuda" else nullcontext():
            for _ in range(num_rounds):
                send(self._groups[generator], held.manifest.tensors, held.tensors, self._device)

    def give_up(self, generator: str) -> None:
        """End the generator's group, and whoever waits in it; it may be unknown."""
        self._pins.pop(generator, None)
        aborted = self._aborts.pop(generator, None)
        if aborted is not None:
            aborted.set()
        group = self._groups.pop(generator, None)
        if group is not None:
            group.abort()


class SendingRank(LearnerRank):
    """A rank whose number 0 sends the weights itself. What comes before and after a transfer, Ray runs in other threads than training."""

    _sender: Sender | None = None

    def snapshot(self, version: int) -> Iterator[WeightsVersion]:
        """Hold the version; yields its manifest alone. The one before is let go first, unless it is being sent."""
        import torch

        started, on_gpu = time.perf_counter(), torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        if self._sender is None:
            backend: Literal["nccl", "gloo"] = "nccl" if self._config.weights.transport == "nccl" else "gloo"
            if backend == "nccl" and not on_gpu:
                raise ConfigError("weights.transport nccl needs a GPU at each learner rank, and this one sees none; set object_store")
            self._sender = Sender(backend, device, self._config.timeouts.weights_s)
        self._sender.hold(None)
        where = device if self._config.weights.held_on == "gpu" else torch.device("cpu")
        held = self._joined.hold(version, where)
        if on_gpu:
            torch.cuda.synchronize()  # the thread that sends does not wait for this one's stream
        self._sender.hold(held)
        if held is not None:
            yield WeightsVersion(manifest=held.manifest, tensors={}, gather_s=time.perf_counter() - started)

    def pin(self, generator: str, version: int) -> bool:
        """See Sender."""
        return self._sender is not None and self._sender.pin(generator, version)

    def open(self, generator: str, world_size: int) -> Meeting:
        """See Sender."""
        return self._ready.open(generator, world_size)

    def meet(self, generator: str, meeting: Meeting) -> None:
        """See Sender."""
        self._ready.meet(generator, meeting)

    def send(self, generator: str, num_rounds: int) -> None:
        """See Sender."""
        self._ready.send(generator, num_rounds)

    def give_up(self, generator: str) -> None:
        """See Sender."""
        if self._sender is not None:
            self._sender.give_up(generator)

    @property
    def _ready(self) -> Sender:
        assert self._sender is not None, "snapshot() must come before any transfer"
        return self._sender

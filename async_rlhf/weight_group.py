"""Weights from the learner's rank 0 straight into the memory of a generator's workers: a group of its own for each generator.

A group is one torch process group that is nobody's default: over NCCL between GPUs, over gloo between CPU processes. Tensors cross
packed into lots, which both sides cut alike from the manifest. Every wait has a deadline, ends as soon as a member dies where the
transport can tell (gloo can), and can be ended from another thread (`abort`): torch's groups allow that, and vLLM's own NCCL
communicator does not.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from async_rlhf.errors import TransferError
from async_rlhf.types import Meeting, TensorSpec

LOT_BYTES = 256 << 20
"""Tensors are packed into lots of at most this size (a larger tensor is a lot of its own); each side has one in memory at a time."""

POLL_S = 0.0005
"""Between two looks at whether a transfer is through."""

BACKSTOP = 4
"""torch's own deadline is this many times ours: NCCL ends the process when it passes, and ours ends the transfer alone."""

_MIX = 0x1E3779B97F4A7C15
"""Odd: what spreads an element's position over the bits of a checksum."""

_CHECKSUM_ELEMENTS = 1 << 22
"""Checked at once, so that a checksum takes 100 MiB at most beside the tensor."""


class WeightGroup:
    """One member's end of a group. Used from one thread; `abort` from any."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device, aborted: threading.Event | None = None) -> None:
        """Meet the others; returns once all are there.

        Args:
            aborted: set from another thread: give up, also before there is anything to `abort`.
        Raises:
            TransferError: they did not come in time.
        """
        self._meeting = meeting
        self._aborted = aborted or threading.Event()
        self._ends = time.monotonic() + meeting.timeout_s
        try:
            store = _join_store(meeting)
            store.set(f"member {rank}", "here")
            self._until(lambda: store.check([f"member {other}" for other in range(meeting.world_size)]), "the meeting")
            self._group = _make_group(meeting, store, rank, device)
        except TransferError:
            raise
        except (RuntimeError, ValueError) as error:
            raise TransferError(f"no meeting at {meeting.address}:{meeting.port}: {error}") from error
        self.broadcast(torch.zeros(1, device=device), "the meeting")  # NCCL connects with the first transfer, not before

    def broadcast(self, tensor: Tensor, what: str) -> None:
        """Send (rank 0) or receive (the others) a tensor, in place.

        Raises:
            TransferError: a member died, or the deadline passed, or somebody aborted. The group is of no more use.
        """
        self._ends = time.monotonic() + self._meeting.timeout_s
        group = self._group
        if group is None:
            raise TransferError(f"the transfer of {what} was given up")
        try:
            work = group.broadcast([tensor], dist.BroadcastOptions())  # pyright: ignore[reportPrivateImportUsage]
            del group  # whoever aborts must hold the last reference
            self._until(work.is_completed, what)
            work.wait()
        except TransferError:
            raise
        except RuntimeError as error:
            raise TransferError(f"the transfer of {what} failed: {error}") from error

    def abort(self) -> None:
        """End whatever goes on, and the group."""
        self._aborted.set()
        grave, self._group = [self._group], None
        # A thread of its own: gloo cannot be interrupted, and its end would wait for what it is at, up to the deadline.
        threading.Thread(target=_bury, args=(grave,), daemon=True).start()

    def _until(self, through: Callable[[], bool], what: str) -> None:
        while not through():
            if self._aborted.is_set():
                raise TransferError(f"the transfer of {what} was given up")
            if time.monotonic() > self._ends:
                raise TransferError(f"the transfer of {what} was not through within {self._meeting.timeout_s:g} s (timeouts.weights_s)")
            time.sleep(POLL_S)


def send(group: WeightGroup, specs: Sequence[TensorSpec], tensors: Sequence[Tensor], device: torch.device) -> None:
    """Send tensors, wherever they are, lot by lot through `device`. Errors as in broadcast."""
    by_name = dict(zip((spec.name for spec in specs), tensors, strict=True))
    for lot in lots(specs):
        buffer = torch.empty(sum(map(num_bytes, lot)), dtype=torch.uint8, device=device)
        for spec, part in _parts(buffer, lot):
            part.copy_(by_name[spec.name])
        group.broadcast(buffer, _title(lot))


def receive(group: WeightGroup, specs: Sequence[TensorSpec], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `send` sends, in order, as views of their lot.

    Raises:
        TransferError: see broadcast; or a tensor's checksum is not the manifest's.
    """
    for lot in lots(specs):
        buffer = torch.empty(sum(map(num_bytes, lot)), dtype=torch.uint8, device=device)
        group.broadcast(buffer, _title(lot))
        for spec, part in _parts(buffer, lot):
            if tensor_checksum(part) != spec.checksum:
                raise TransferError(f"tensor {spec.name} was damaged on its way: its checksum differs")
            yield spec.name, part


def lots(specs: Sequence[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Consecutive tensors that cross together."""
    lot: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if lot and size + num_bytes(spec) > LOT_BYTES:
            yield lot
            lot, size = [], 0
        lot.append(spec)
        size += num_bytes(spec)
    if lot:
        yield lot


def num_bytes(spec: TensorSpec) -> int:
    """Of a tensor on its way."""
    return torch.Size(spec.shape).numel() * dtype_of(spec).itemsize


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """Torch's own."""
    return getattr(torch, spec.dtype)


def tensor_checksum(tensor: Tensor) -> int:
    """64 bits of a tensor of 2- or 4-byte elements: a sum of each element's bits times an odd number of its own, so that any one
    changed element changes it. Exact, and equal on every device.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHECKSUM_ELEMENTS):
        part = bits[start : start + _CHECKSUM_ELEMENTS].long()
        positions = torch.arange(start, start + part.numel(), dtype=torch.int64, device=tensor.device)
        total += (part * ((positions * _MIX) * 2 + 1)).sum()  # int64 wraps around: arithmetic modulo 2**64
    return int(total) & (2**64 - 1)


def own_address(towards: str, port: int) -> str:
    """The address of this machine's that reaches `towards`."""
    with socket.socket(socket.AF_INET6 if ":" in towards else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, port))
        return str(probe.getsockname()[0])


def _join_store(meeting: Meeting) -> Any:
    module: Any = dist
    timeout = timedelta(seconds=meeting.timeout_s)
    return module.PrefixStore(meeting.key, module.TCPStore(meeting.address, meeting.port, is_master=False, timeout=timeout))


def _make_group(meeting: Meeting, store: Any, rank: int, device: torch.device) -> Any:
    module: Any = dist
    backstop = timedelta(seconds=BACKSTOP * meeting.timeout_s)
    if meeting.backend == "gloo":
        options = module.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=meeting.timeout_s)
        hostname = own_address(meeting.address, meeting.port)
        options._devices = [module.ProcessGroupGloo.create_device(hostname=hostname)]
        return module.ProcessGroupGloo(store, rank, meeting.world_size, options)
    torch.cuda.set_device(device)
    options = module.ProcessGroupNCCL.Options()
    options._timeout = backstop
    return module.ProcessGroupNCCL(store, rank, meeting.world_size, options)


def _bury(grave: list[Any]) -> None:
    group = grave.pop()
    if group is not None:
        group.abort()


def _parts(buffer: Tensor, lot: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, Tensor]]:
    """Each tensor of a lot as a view of the buffer."""
    start = 0
    for spec in lot:
        size = num_bytes(spec)
        yield spec, buffer[start : start + size].view(dtype_of(spec)).view(spec.shape)
        start += size


def _title(lot: Sequence[TensorSpec]) -> str:
    return f"{lot[0].name} to {lot[-1].name}" if len(lot) > 1 else lot[0].name

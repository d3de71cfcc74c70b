"""The actor around one Learner: it holds the process and its place in the group.

The heavy imports (torch, transformers, deepspeed: seconds) happen inside, so that whoever starts the actor is spared them.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from async_rlhf.config import Config
from async_rlhf.types import ScoredGroup, StepReport, WeightsVersion

if TYPE_CHECKING:
    from learners.learner import Learner


class LearnerRank:
    """One rank. Construct all, `join` all at once, then call every further method on all at once."""

    def __init__(self, config: Config, model_folder: str, rank: int) -> None:
        self._config = config
        self._folder = Path(model_folder)
        self._rank = rank
        self._learner: Learner | None = None
        self._store: object = None
        if config.learner.num_gpus == 0:
            os.environ["DS_ACCELERATOR"] = "cpu"
        # The slow import, while the other actors do theirs.
        import_module("learners.learner")

    def rendezvous(self) -> tuple[str, int]:
        """Open the store at which the ranks meet, on rank 0: its address and port. Bound before anybody is told, so never taken."""
        address, port, self._store = open_store()
        return address, port

    def join(self, address: str, port: int, checkpoint: str | None = None) -> int:
        """Meet the other ranks and load the policy; returns the version it starts from.

        Args:
            checkpoint: go on from this folder, see Learner.load; None: version 0.
        """
        from ray.util import get_node_ip_address

        from learners.engine import join_process_group
        from learners.learner import Learner

        join_process_group(
            rank=self._rank,
            world_size=self._config.learner.num_ranks,
            address=address,
            port=port,
            timeout_s=self._config.timeouts.step_s,
            interface=_interface_of(get_node_ip_address()),
        )
        self._learner = Learner(self._config, self._folder)
        return 0 if checkpoint is None else self._learner.load(Path(checkpoint))

    def train_step(self, update: int, minibatches: Sequence[Sequence[ScoredGroup]]) -> StepReport:
        """See Learner.train_step."""
        return self._joined.train_step(update, minibatches)

    def snapshot(self, version: int) -> Iterator[WeightsVersion]:
        """See Learner.snapshot; called as a stream: Ray copies each bucket, an object of its own, before it asks for the next."""
        yield from self._joined.snapshot(version, lent=True)

    def save_pretrained(self, folder: str) -> None:
        """See Learner.save_pretrained."""
        self._joined.save_pretrained(Path(folder))

    def save(self, folder: str, version: int) -> None:
        """See Learner.save."""
        self._joined.save(Path(folder), version)

    def saved(self) -> dict[str, tuple[int, int]]:
        """See Learner.saved."""
        return self._joined.saved()

    @property
    def _joined(self) -> "Learner":
        assert self._learner is not None, "join() must come before any other call"
        return self._learner


def open_store() -> tuple[str, int, object]:
    """A store at which processes meet, on a free port of the node's cluster address: address, port, and what keeps it open."""
    import ray
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # public, says its documentation

    address = ray.util.get_node_ip_address()
    listener = socket.socket()
    listener.bind((address, 0))
    listener.listen()
    port = int(listener.getsockname()[1])
    return address, port, TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _interface_of(address: str) -> str:
    """The network interface with this address; empty where there is none."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(entry.address == address for entry in addresses)), "")

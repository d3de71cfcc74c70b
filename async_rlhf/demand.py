"""What the parts of a run ask of a cluster, and whether some cluster can hold them at all: pure arithmetic."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from async_rlhf.config import Config

KINDS = ("CPU", "GPU")
"""What is reserved, by Ray's names."""

ROUNDING = 1e-6
"""Ray counts shares of a GPU in ten-thousandths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Some parts of one kind, each of which needs its CPUs and GPUs on one node."""

    part: str
    """In the singular, for people."""
    count: int
    num_cpus: float
    """Of one."""
    num_gpus: float
    """Of one; below 1: a share, and others have the rest."""

    @property
    def bundle(self) -> dict[str, float]:
        """What one reserves: Ray's name -> amount above 0."""
        return {kind: amount for kind, amount in zip(KINDS, (self.num_cpus, self.num_gpus), strict=True) if amount > 0}

    def __str__(self) -> str:
        return f"{self.count} {self.part}{'s' if self.count != 1 else ''} x {_amounts(self.bundle)}"


def demands_of(config: Config) -> list[Demand]:
    """Of a whole run; parts that reserve nothing are left out."""
    parts = (
        ("learner rank", config.learner.num_ranks, config.learner),
        ("generator", config.generator.count, config.generator),
        ("scorer", config.scorer.count, config.scorer),
        ("reward actor", config.reward.count, config.reward),
    )
    demands = [Demand(part=name, count=count, num_cpus=of.num_cpus, num_gpus=of.num_gpus) for name, count, of in parts]
    return [demand for demand in demands if demand.count and demand.bundle]


def total(demands: Iterable[Demand]) -> dict[str, float]:
    """All together: Ray's name -> amount."""
    demands = list(demands)
    return {kind: sum(demand.count * demand.bundle.get(kind, 0.0) for demand in demands) for kind in KINDS}


def shortage(demands: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> str:
    """Why these nodes can never hold the demands at once, however empty they are; nothing where they might.

    Args:
        nodes: Ray's name -> amount, of each node.
    """
    asked = f"the run asks for {describe(demands)}; the Ray cluster has {describe_nodes(nodes)}"
    for demand in demands:
        room = sum(_times(demand.bundle, node) for node in nodes)
        if not room:
            return f"{asked}: no node has {_amounts(demand.bundle)} for one {demand.part}"
        if room < demand.count:
            return f"{asked}: its nodes have room for {room} of the {demand.count} {demand.part}s"
    there = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in KINDS}
    missing = [kind for kind, amount in total(demands).items() if amount > there[kind] + ROUNDING]
    return f"{asked}: too few {' and '.join(f'{kind}s' for kind in missing)}" if missing else ""


def describe(demands: Sequence[Demand]) -> str:
    """`2 generators x 1 GPU, 4 learner ranks x 1 GPU (together 6 GPU)`."""
    together = f" (together {_amounts(total(demands))})" if len(demands) > 1 else ""
    return f"{', '.join(map(str, demands))}{together}"


def describe_nodes(nodes: Sequence[Mapping[str, float]]) -> str:
    """`10 CPU and 2 GPU, at most 6 CPU and 1 GPU on one of its 3 nodes`."""
    there = _amounts({kind: sum(node.get(kind, 0.0) for node in nodes) for kind in KINDS}, zeros=True)
    if len(nodes) < 2:
        return there
    largest = _amounts({kind: max(node.get(kind, 0.0) for node in nodes) for kind in KINDS}, zeros=True)
    return f"{there}, at most {largest} on one of its {len(nodes)} nodes"


def _times(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    """How many of these bundles an empty node holds."""
    return min(math.floor(node.get(kind, 0.0) / amount + ROUNDING) for kind, amount in bundle.items())


def _amounts(amounts: Mapping[str, float], *, zeros: bool = False) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in amounts.items() if amount or zeros)

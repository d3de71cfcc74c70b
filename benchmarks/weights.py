"""A policy version from the learner's memory into the generators', against one copy of the same bytes and the engine's own reload.

    python benchmarks/weights.py [--quick] [--json FILE]

The way of a run over the object store: the learner's snapshot with manifest and checksums is pulled by the weight broadcaster, offered,
fetched by each generator, its checksums are verified, vLLM loads it between two steps, the canary is sampled. What is timed:
  publish    from the call until the broadcaster has the version. Without the canary that the learner computes before it (a forward of 32
             tokens, which is no transfer); the policy is a plain model of transformers, float32, and no optimizer stands around it.
  transfer   from the call of install() until the engine may load: fetched, manifest and checksums verified.
  pause      in which the engine cannot step, because its weights are being replaced.
  reload     vLLM's own reload_weights() with the same tensors, alone, on the same engine: what the pause is measured against.
  memcpy     numpy copies the same bytes, array by array, from memory to memory that is there already: no page is new. One thread.
At RECEIVED sizes the generators are real; at all of them a receiver takes part that does everything but the engine's load, and it is what
the growth of the cost is measured with (vLLM of the largest would not fit beside it). Two generators install at once, on a core each.
Versions are published until the store's memory has been used before: the first ones also pay for new pages.
"""

import argparse
import asyncio
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Goal, command_line, finish, growth, ratios, show
from weight_stand_ins import Copier, Engine, Policy, Receiver

from actors.canary import shapes_of_versions
from actors.launch import ActorSpec, Cluster, connect, ready
from actors.remote import RemoteActor
from actors.weight_broadcaster import Offer, WeightBroadcaster
from async_rlhf.config import Config, load_config
from async_rlhf.tasks.start import build_tokenizer
from async_rlhf.types import InstallReport

GOALS = (Goal(metric="ratio_to_memcpy", at_most=3), Goal(metric="pause_ratio", at_most=1.1), Goal(metric="n2_over_n1", at_most=1.3))
SHAPES = {  # hidden size, layers, intermediate size, vocabulary
    "1M": (128, 4, 384, 512),
    "10M": (384, 5, 1024, 2048),
    "50M": (768, 6, 2048, 4096),
    "100M": (768, 13, 2048, 4096),
    "500M": (1536, 17, 4096, 8192),
}
RECEIVED = ("1M", "10M", "100M")
"""Installed in real engines too."""
QUICK = ("1M", "10M", "50M")
WARM_VERSIONS = 4
STORE_MIB = 8192
LIMIT_S = 180.0


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One version, from its publication until the last generator had it. Seconds."""

    publish_s: float
    transfer_s: float
    """Of the slowest generator."""
    pause_s: float
    """Likewise."""
    total_s: float

    @property
    def moved_s(self) -> float:
        """All but the engine's own part."""
        return self.publish_s + self.transfer_s


class Stage:
    """The parts for one size: a policy, the broadcaster, up to two generators."""

    def __init__(self, cluster: Cluster, config: Config, folder: Path, size: str, cls: type) -> None:
        self._cluster = cluster
        self._version = 0
        where, name = str(make_folder(folder, size)), f"{size}-{cls.__name__}"
        self.policy = self._start(f"policy-{name}", Policy, config, where)
        self.broadcaster = self._start(f"broadcaster-{name}", WeightBroadcaster, LIMIT_S)
        self.copier = self._start(f"copier-{name}", Copier)
        self.generators = [
            self._start(f"generator-{index}-{name}", cls, config, where, f"g{index}", max_concurrency=8) for index in range(2)
        ]
        self._actors = [self.policy, self.broadcaster, self.copier, *self.generators]

    async def begin(self) -> None:
        """Until all are there, and the store's memory has been used."""
        await asyncio.gather(*(ready(actor, LIMIT_S, lambda name: None) for actor in self._actors))
        for _ in range(WARM_VERSIONS):
            await self.deliver(2)

    async def deliver(self, count: int) -> Delivery:
        """Publish the next version, and install it in `count` generators at once."""
        self._version += 1
        started = time.perf_counter()
        published = await self.broadcaster.call("publish", self._version, [self.policy], timeout_s=LIMIT_S)
        offer = await self._offer()
        publish_s = time.perf_counter() - started
        begun = time.perf_counter()

        async def install(generator: RemoteActor) -> tuple[float, InstallReport]:
            report: InstallReport = await generator.call("install", *offer.buckets, timeout_s=LIMIT_S)
            return time.perf_counter() - begun, report

        installed = await asyncio.gather(*(install(generator) for generator in self.generators[:count]))
        assert all(report.version == published.version for _, report in installed)
        return Delivery(
            publish_s=publish_s,
            transfer_s=max(seconds - report.pause_s - report.canary_s for seconds, report in installed),
            pause_s=max(report.pause_s for _, report in installed),
            total_s=time.perf_counter() - started,
        )

    async def of_newest(self, actor: RemoteActor, method: str) -> float:
        """What a method makes of the newest version."""
        return float(await actor.call(method, *(await self._offer()).buckets, timeout_s=LIMIT_S))

    def close(self) -> None:
        """End all actors."""
        import ray

        for actor in self._actors:
            ray.kill(actor.handle)

    async def _offer(self) -> Offer:
        offer: Offer | None = await self.broadcaster.call("newer_than", self._version - 1, 5.0, timeout_s=LIMIT_S)
        assert offer is not None
        return offer

    def _start(self, name: str, cls: type, *args: Any, max_concurrency: int | None = None) -> RemoteActor:
        return self._cluster.start(ActorSpec(name=name, cls=cls, args=args, max_concurrency=max_concurrency))


def make_folder(folder: Path, size: str) -> Path:
    """A Hugging Face folder of that architecture, without weights: every version brings them."""
    from transformers import LlamaConfig

    made = folder / size
    if not made.exists():
        hidden, layers, intermediate, vocabulary = SHAPES[size]
        architecture = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            intermediate_size=intermediate,
            max_position_embeddings=512,
            architectures=["LlamaForCausalLM"],
            tie_word_embeddings=False,
        )
        architecture.save_pretrained(made)
        build_tokenizer().save_pretrained(made)
    return made


def num_bytes(size: str, folder: Path, config: Config) -> int:
    """Of one version."""
    return 4 * sum(math.prod(shape) for shape in shapes_of_versions(make_folder(folder, size), config.learner.lora).values())


async def received(stage: Stage, rounds: int) -> dict[str, list[float]]:
    """Round by round: deliveries to one and to two, a copy of the same bytes."""
    found: dict[str, list[float]] = {name: [] for name in ("memcpy", "publish", "transfer", "moved", "moved2")}
    for _ in range(rounds):
        found["memcpy"].append(await stage.of_newest(stage.copier, "copy"))
        one, two = await stage.deliver(1), await stage.deliver(2)
        for name, value in (("publish", one.publish_s), ("transfer", one.transfer_s), ("moved", one.moved_s), ("moved2", two.moved_s)):
            found[name].append(value)
    return found


async def installed(stage: Stage, rounds: int) -> dict[str, list[float]]:
    """Round by round: deliveries to one and to two real generators, and the engine's own reload."""
    found: dict[str, list[float]] = {name: [] for name in ("reload", "pause", "total", "total2", "moved")}
    for _ in range(rounds):
        found["reload"].append(await stage.of_newest(stage.generators[0], "reload_alone"))
        one, two = await stage.deliver(1), await stage.deliver(2)
        for name, value in (("pause", one.pause_s), ("total", one.total_s), ("total2", two.total_s), ("moved", one.moved_s)):
            found[name].append(value)
    return found


def measure(
    bench: tuple[Cluster, Config, Path], size: str, cls: type, how: Callable[[Stage, int], Any], rounds: int
) -> dict[str, list[float]]:
    """One size with generators of one kind."""

    async def work() -> dict[str, list[float]]:
        stage = Stage(*bench, size, cls)
        try:
            await stage.begin()
            return await how(stage, rounds)
        finally:
            stage.close()

    return asyncio.run(work())


def moved(bench: tuple[Cluster, Config, Path], sizes: Sequence[str], rounds: int) -> dict[str, float]:
    """The table of publication and transfer."""
    metrics: dict[str, float] = {}
    rows: list[Sequence[object]] = []
    volumes: list[int] = []
    seconds: list[float] = []
    for size in sizes:
        found = measure(bench, size, Receiver, received, rounds)
        volume = num_bytes(size, bench[2], bench[1])
        ratio, second = ratios(found["moved"], found["memcpy"]), ratios(found["moved2"], found["moved"])
        volumes.append(volume)
        seconds.append(float(np.median(found["moved"])))
        milliseconds = [float(np.median(found[name])) * 1e3 for name in ("memcpy", "publish", "transfer")]
        rows.append((size, volume / 2**20, *milliseconds, ratio, second))
        metrics |= {f"ratio_to_memcpy_{size}": ratio.median, f"moved_n2_over_n1_{size}": second.median, "ratio_to_memcpy": ratio.median}
    columns = ("parameters", "MiB", "memcpy, ms", "publish, ms", "transfer, ms", "(publish + transfer) / memcpy", "2 receivers / 1")
    slope = growth(volumes, seconds)
    show(
        "Published and moved",
        columns,
        rows,
        f"publish + transfer grow with the bytes to the power of {slope:.2f}; medians of {rounds} rounds",
    )
    return metrics


def paused(bench: tuple[Cluster, Config, Path], sizes: Sequence[str], rounds: int) -> dict[str, float]:
    """The table of real engines."""
    metrics: dict[str, float] = {}
    rows: list[Sequence[object]] = []
    for size in sizes:
        found = measure(bench, size, Engine, installed, rounds)
        pause, second = ratios(found["pause"], found["reload"]), ratios(found["total2"], found["total"])
        milliseconds = [float(np.median(found[name])) * 1e3 for name in ("reload", "pause", "moved", "total")]
        rows.append((size, *milliseconds, pause, second))
        metrics |= {f"pause_ratio_{size}": pause.median, f"n2_over_n1_{size}": second.median}
        metrics |= {"pause_ratio": pause.median, "n2_over_n1": second.median}
    columns = ("parameters", "reload, ms", "pause, ms", "publish + transfer, ms", "published -> installed, ms", "pause / reload", "2 / 1")
    show("Installed in vLLM", columns, rows, f"2 / 1: published -> installed on two generators, to that on one; medians of {rounds} rounds")
    return metrics


def main(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was found."""
    config = load_config(
        overrides=[f"run.object_store_mib={STORE_MIB if not arguments.quick else 1024}", "generator.max_model_len=128"]
    ).config
    sizes, rounds = (QUICK, 7) if arguments.quick else (tuple(SHAPES), 11)
    engines = ("1M", "10M") if arguments.quick else RECEIVED
    with tempfile.TemporaryDirectory(prefix="rlhf-weights-") as name:
        folder = Path(name)
        cluster = connect(config, "weights", folder / "ray")
        try:
            bench = cluster, config, folder
            metrics = moved(bench, sizes, rounds) | paused(bench, engines, rounds)
        finally:
            cluster.close()
    finish(arguments, metrics, GOALS)


if __name__ == "__main__":
    main(command_line(__doc__, "up to 50M parameters, engines up to 10M, fewer rounds").parse_args())

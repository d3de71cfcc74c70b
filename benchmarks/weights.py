"""A policy version from the learner's memory into the generators', against one copy of the same bytes and the engine's own reload.

    python benchmarks/weights.py [--quick] [--only installed] [--json FILE]

The way of a run over the object store: the learner's snapshot with manifest and checksums is pulled by the weight broadcaster, offered to
the generators, whose requests wait there, fetched by each, its checksums are verified, vLLM loads it between two steps, the canary is
sampled. What is timed:
  publish    from the call until the last generator was offered the version. Without the canary that the learner computes before it (a
             forward of 32 tokens, which is no transfer); the policy is a plain model of transformers, float32, no optimizer around it.
  transfer   from the offer until install() has returned, without pause and canary: fetched, manifest and checksums verified.
  pause      in which the engine cannot step, because its weights are being replaced.
  reload     vLLM's own reload_weights() with the same tensors, alone, on the same engine: what the pause is measured against; and on two
             engines at once, which says what two cores make of it.
  memcpy     numpy copies the same bytes, array by array, from memory to memory that is there already: no page is new. One thread.
  ray.put    Ray's copy of the same arrays into its store, in the learner's process: what no way through the store can go below.
At ENGINES sizes the generators are real; at all of them a receiver takes part that does everything but the engine's load, and it is what
the growth of the cost is measured with (vLLM of the largest would not fit beside it). Two generators install at once, on a core each.
Versions are published until the store's memory has been used before: the first ones also pay for new pages.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Goal, command_line, finish, growth, in_turn, ratios, show

from actors.canary import shapes_of_versions
from actors.session import open_session
from async_rlhf.config import Config, load_config
from async_rlhf.tasks.start import build_tokenizer

GOALS = (Goal(metric="ratio_to_memcpy", at_most=3), Goal(metric="pause_ratio", at_most=1.1), Goal(metric="n2_over_n1", at_most=1.3))
SHAPES = {  # hidden size, layers, intermediate size, vocabulary
    "1M": (128, 4, 384, 512),
    "10M": (384, 5, 1024, 2048),
    "50M": (768, 6, 2048, 4096),
    "100M": (768, 13, 2048, 4096),
    "500M": (1536, 17, 4096, 8192),
}
ENGINES = ("1M", "10M", "100M")
"""Installed in real engines too."""
QUICK = ("1M", "10M", "50M")
HEADLINE = "50M"
"""Size of `ratio_to_memcpy`: in the middle, and in a quick run too; every size has a metric of its own."""
HEADLINE_ENGINE = "10M"
"""Size of `pause_ratio` and `n2_over_n1`."""
STORE_MIB = 8192
"""Three versions of the largest, and what Ray needs around them."""


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


def num_bytes(folder: Path, config: Config) -> int:
    """Of one version."""
    return 4 * sum(math.prod(shape) for shape in shapes_of_versions(folder, config.learner.lora).values())


def medians_ms(*columns: Sequence[float]) -> list[float]:
    """Of seconds."""
    return [float(np.median(column)) * 1e3 for column in columns]


def moved(begin: Callable[[str], Any], sizes: Sequence[str], volumes: Sequence[int], rounds: int) -> dict[str, float]:
    """The table of publication and transfer.

    Args:
        begin: a Stage with receivers, for a size. volumes: bytes of a version, of each size.
    """
    metrics: dict[str, float] = {}
    rows: list[Sequence[object]] = []
    seconds: list[float] = []
    for size, volume in zip(sizes, volumes, strict=True):
        with closing(begin(size)) as stage:
            one, two = partial(stage.deliver, 1), partial(stage.deliver, 2)
            found: dict[str, list[Any]] = in_turn({"memcpy": stage.copy, "put": stage.put, "one": one, "two": two}, rounds)
        moved_s = [delivery.moved_s for delivery in found["one"]]
        moved2_s = [delivery.moved_s for delivery in found["two"]]
        publish_s, transfer_s = ([getattr(delivery, name) for delivery in found["one"]] for name in ("publish_s", "transfer_s"))
        ratio, to_put, second = ratios(moved_s, found["memcpy"]), ratios(moved_s, found["put"]), ratios(moved2_s, moved_s)
        seconds.append(float(np.median(moved_s)))
        milliseconds = medians_ms(found["memcpy"], found["put"], publish_s, transfer_s)
        rows.append((size, volume / 2**20, *milliseconds, ratio, to_put.median, second))
        metrics |= {
            f"ratio_to_memcpy_{size}": ratio.median,
            f"ratio_to_put_{size}": to_put.median,
            f"moved_n2_over_n1_{size}": second.median,
        }
    columns = ("", "MiB", "memcpy", "ray.put", "publish", "transfer", "moved / memcpy", "/ ray.put", "2 receivers / 1")
    note = f"milliseconds, medians of {rounds} rounds; moved: publish + transfer; they grow with the bytes to the power of "
    show("Published and moved", columns, rows, f"{note}{growth(volumes, seconds):.2f}")
    return metrics | {"ratio_to_memcpy": metrics[f"ratio_to_memcpy_{HEADLINE}"]}


def paused(begin: Callable[[str], Any], sizes: Sequence[str], rounds: int) -> dict[str, float]:
    """The table of real engines.

    Args:
        begin: a Stage with engines, for a size.
    """
    metrics: dict[str, float] = {}
    rows: list[Sequence[object]] = []
    for size in sizes:
        with closing(begin(size)) as stage:
            measures = {"reload": partial(stage.reload, 1), "one": partial(stage.deliver, 1), "two": partial(stage.deliver, 2)}
            found: dict[str, list[Any]] = in_turn({**measures, "reload2": partial(stage.reload, 2)}, rounds)
        pause_s, moved_s, total_s = ([getattr(delivery, f"{name}_s") for delivery in found["one"]] for name in ("pause", "moved", "total"))
        total2_s = [delivery.total_s for delivery in found["two"]]
        pause, second = ratios(pause_s, found["reload"]), ratios(total2_s, total_s)
        alone = ratios(found["reload2"], found["reload"])
        rows.append((size, *medians_ms(found["reload"], pause_s, moved_s, total_s), pause, second, alone))
        metrics |= {f"pause_ratio_{size}": pause.median, f"n2_over_n1_{size}": second.median, f"reload_n2_over_n1_{size}": alone.median}
    columns = ("", "reload", "pause", "moved", "published -> installed", "pause / reload", "2 generators / 1", "2 reloads / 1")
    show("Installed in vLLM", columns, rows, f"milliseconds, medians of {rounds} rounds; 2 / 1: of two at once, to one")
    return metrics | {name: metrics[f"{name}_{HEADLINE_ENGINE}"] for name in ("pause_ratio", "n2_over_n1")}


def main(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was found."""
    session = open_session()  # before Ray is imported
    from weight_deliveries import Stage
    from weight_stand_ins import Engine, Receiver

    from actors.launch import connect

    overrides = [f"run.object_store_mib={STORE_MIB if not arguments.quick else 1024}", "generator.max_model_len=128"]
    config = load_config(overrides=overrides).config
    sizes, rounds = (QUICK, 7) if arguments.quick else (tuple(SHAPES), 11)
    cluster = connect(config, "weights", session)
    try:
        with tempfile.TemporaryDirectory(prefix="rlhf-weights-") as name:
            folders = {size: make_folder(Path(name), size) for size in sizes}

            def begin(cls: type, size: str) -> Stage:
                return Stage(cluster, config, str(folders[size]), cls)

            metrics: dict[str, float] = {}
            if arguments.only != "installed":
                volumes = [num_bytes(folders[size], config) for size in sizes]
                metrics |= moved(partial(begin, Receiver), sizes, volumes, rounds)
            if arguments.only != "moved":
                metrics |= paused(partial(begin, Engine), [size for size in sizes if size in ENGINES], rounds)
    finally:
        cluster.close()
    finish(arguments, metrics, GOALS)


if __name__ == "__main__":
    parser = command_line(__doc__, "up to 50M parameters, engines up to 10M, fewer rounds")
    parser.add_argument("--only", choices=("moved", "installed"), help="that table alone")
    main(parser.parse_args())

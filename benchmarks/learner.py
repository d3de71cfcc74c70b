"""The learner against a bare torch loop, packed against padded batches, and the head's memory.

    python benchmarks/learner.py [--quick] [--json FILE]

Ours is Learner.train_step: RLOO on groups of K = 4, with all that a run gets from it (collating, entropy, KL and other metrics, checks),
under DeepSpeed with ZeRO 0 to 3. The bare loop (bare_loop.py) is what one writes by hand: the same model, packed attention and
microbatches, the head on completion tokens alone, the same loss, fused AdamW, clipping; no metrics, no checks, and its microbatches are
collated beforehand at no cost to it. With two ranks it adds up the gradients once per step, whatever the stage. Both take turns in one
process per rank, with a core and a thread of its own, and must report the same loss and gradient norm.

`ratio_to_bare_torch` is that of stage 0 and one rank, the defaults; `packing_gain` that of long-tailed lengths and microbatches of the
default size: smaller ones hold lengths more alike, and leave packing less to gain. The head's memory is counted, not timed: the largest
sum of bytes of all tensors as wide as the vocabulary that live at the same time, forward and backward.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}  # before torch is imported

import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from bare_loop import BareLoop, collated, make_batch, make_model
from harness import Goal, Spread, command_line, finish, growth, in_turn, ratios, show
from head_memory import peak_logits_bytes
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # public, says its documentation

from async_rlhf.config import Config, load_config
from async_rlhf.config.schema import LearnerConfig
from async_rlhf.sharding import shard_batch

PROMPT_TOKENS = 24
LENGTHS = {"long-tailed": (32.0, 0.9, 512), "one length": (48.0, 0.0, 48)}
"""Median and sigma of the log-normal completion lengths, and their limit."""
GROUPS = {"1M": 32, "10M": 8, "50M": 4}
"""A batch per model size: about a second or two of one core."""
LARGER_GROUPS = 32
"""Of the headline's size, for two ranks whose steps have more to share."""
HEADLINE = "10M"
DEFAULT_TOKENS = LearnerConfig().max_tokens_per_microbatch
PACKING_GOAL, RATIO_GOAL, MAX_SLOPE = 1.5, 0.90, 0.05


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison in the worker processes."""

    size: str = HEADLINE
    zero_stage: int = 0
    lengths: str = "long-tailed"
    tokens: int = 4096
    """Of a microbatch, at most."""
    against: str = "bare"
    """The bare loop, or `padded`: train_step on padded batches."""
    groups: int = 0
    """In the batch; 0: those of the size."""

    def config(self, num_ranks: int, batching: str) -> Config:
        """What train_step is given."""
        settings = (
            f"learner.zero_stage={self.zero_stage}",
            f"learner.max_tokens_per_microbatch={self.tokens}",
            "generator.max_model_len=1024",
        )
        fixed = ("algorithm=rloo", "learner.schedule=constant", "learner.warmup_steps=0", f"learner.num_ranks={num_ranks}")
        return load_config([], [*fixed, *settings, f"learner.batching={batching}"]).config


@dataclass(frozen=True)
class Times:
    """Seconds per update, round by round."""

    ours: list[float]
    other: list[float]
    num_tokens: int

    @property
    def row(self) -> tuple[float, float, str]:
        """Tokens per second of both, and the ratio with its spread."""
        return self.num_tokens / float(np.median(self.ours)), self.num_tokens / float(np.median(self.other)), str(self.ratio)

    @property
    def ratio(self) -> Spread:
        """Ours over the other's, in tokens per second."""
        return ratios(self.other, self.ours)


def work(rank: int, num_ranks: int, port: int, cases: Sequence[Case], folder: Path, rounds: int, answers: Connection) -> None:
    """One rank: every case in turn; rank 0 sends the Times."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    torch.set_num_threads(1)
    from learners.engine import join_process_group

    join_process_group(rank=rank, world_size=num_ranks, address="127.0.0.1", port=port, timeout_s=300)
    for case in cases:
        times = compare(case, rank, num_ranks, folder, rounds)
        if rank == 0:
            answers.send(times)


def compare(case: Case, rank: int, num_ranks: int, folder: Path, rounds: int) -> Times:
    """Both do the same work in the warm-up, then take turns."""
    from learners.learner import Learner

    median, sigma, max_tokens = LENGTHS[case.lengths]
    batch = make_batch(case.groups or GROUPS[case.size], median=median, sigma=sigma, max_tokens=max_tokens, prompt_tokens=PROMPT_TOKENS)
    shard = shard_batch(batch, num_ranks=num_ranks, num_minibatches=1)[rank]
    config = case.config(num_ranks, "packed")
    learner = Learner(config, folder / case.size)
    report = learner.train_step(0, shard)
    if case.against == "bare":
        bare, microbatches = BareLoop(folder / case.size, config), collated(shard[0], config)
        step: Callable[[], object] = partial(bare.step, microbatches, 4 * len(batch.groups))
        loss, norm = bare.step(microbatches, 4 * len(batch.groups))
    else:
        other = Learner(case.config(num_ranks, "padded"), folder / case.size)
        step = partial(other.train_step, 0, shard)
        metrics = other.train_step(0, shard).metrics
        loss, norm = metrics["train/loss"] / num_ranks, metrics["train/grad_norm"]
    total = torch.tensor([loss], dtype=torch.float64)
    dist.all_reduce(total)
    np.testing.assert_allclose([total.item(), norm], [report.metrics["train/loss"], report.metrics["train/grad_norm"]], rtol=1e-3)
    found = in_turn({"ours": lambda: timed(partial(learner.train_step, 0, shard)), "other": lambda: timed(step)}, rounds)
    return Times(found["ours"], found["other"], report.num_tokens)


def timed(step: Callable[[], object]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    started = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - started


def run(cases: Sequence[Case], num_ranks: int, folder: Path, rounds: int) -> list[Times]:
    """The cases on that many processes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    workers = [context.Process(target=work, args=(rank, num_ranks, store.port, cases, folder, rounds, sender)) for rank in range(num_ranks)]
    for worker in workers:
        worker.start()
    sender.close()
    try:
        return [receiver.recv() for _ in cases]
    except EOFError:
        raise SystemExit("a rank died; see above") from None
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()


def against_bare(folder: Path, rounds: int, quick: bool) -> dict[str, float]:
    """Stages and ranks, then what grows: microbatches, parameters, ranks."""
    stages = [Case(zero_stage=stage) for stage in range(4)]
    microbatches = [Case(size="1M", tokens=tokens) for tokens in ((1024, 16384) if quick else (512, 1024, 2048, 4096, 8192, 16384))]
    models = [Case(size=size) for size in (("1M",) if quick else ("1M", "50M"))]
    on_one = run([*stages, *microbatches, *models], 1, folder, rounds)
    larger = [Case(zero_stage=stage, groups=LARGER_GROUPS) for stage in (() if quick else (2, 3))]
    on_two = run([*stages, *larger], 2, folder, rounds)
    rows = [(f"{ranks}", stage, *times.row) for ranks, found in ((1, on_one), (2, on_two)) for stage, times in enumerate(found[:4])]
    show(f"train_step and the bare loop, {HEADLINE} parameters", ("ranks", "ZeRO", "ours, tokens/s", "bare", "ratio"), rows)
    if larger:
        both = zip([*stages[2:], *larger], on_two[2:], strict=True)
        rows = [(case.zero_stage, case.groups or GROUPS[HEADLINE], *times.row) for case, times in both]
        show(f"Two ranks as the batch grows, {HEADLINE} parameters", ("ZeRO", "groups", "ours, tokens/s", "bare", "ratio"), rows)
    by_tokens = on_one[4 : 4 + len(microbatches)]
    slope = growth([case.tokens for case in microbatches], [float(np.median(times.ours)) for times in by_tokens])
    title, columns = "Tokens per microbatch (1M parameters, stage 0, one rank)", ("at most", "ours, tokens/s", "bare", "ratio")
    rows = [(case.tokens, *times.row) for case, times in zip(microbatches, by_tokens, strict=True)]
    show(title, columns, rows, f"update time ~ tokens^{slope:.2f}")
    by_size = {HEADLINE: on_one[0]} | {case.size: times for case, times in zip(models, on_one[4 + len(microbatches) :], strict=True)}
    by_size = {size: by_size[size] for size in GROUPS if size in by_size}
    slope = growth([float(size[:-1]) for size in by_size], [float(np.median(times.ours)) / times.num_tokens for times in by_size.values()])
    rows = [(size, *times.row) for size, times in by_size.items()]
    show("Parameters (stage 0, one rank)", ("", *columns[1:]), rows, f"time per token ~ parameters^{slope:.2f}")
    metrics = {
        f"ratio_{ranks}_ranks_zero_{stage}": found[stage].ratio.median for ranks, found in ((1, on_one), (2, on_two)) for stage in range(4)
    }
    metrics |= {
        f"ratio_2_ranks_zero_{case.zero_stage}_{case.groups}_groups": times.ratio.median
        for case, times in zip(larger, on_two[4:], strict=True)
    }
    metrics |= {f"ratio_{size}": times.ratio.median for size, times in by_size.items()}
    metrics["two_ranks_speedup"] = float(np.median(on_one[0].ours) / np.median(on_two[0].ours))
    return {"ratio_to_bare_torch": on_one[0].ratio.median, **metrics}


def packing(folder: Path, rounds: int) -> dict[str, float]:
    """train_step on packed batches against padded ones, groups of like length together in both."""
    tailed = [Case(size="1M", tokens=tokens, against="padded") for tokens in (DEFAULT_TOKENS, 4096, 1024)]
    cases = [*tailed, Case(size="1M", tokens=DEFAULT_TOKENS, lengths="one length", against="padded")]
    found = run(cases, 1, folder, rounds)
    rows = [(case.lengths, case.tokens, *times.row) for case, times in zip(cases, found, strict=True)]
    show("Packed and padded (1M parameters)", ("completions", "microbatch", "packed, tokens/s", "padded", "gain"), rows)
    of_size = {f"packing_gain_{case.tokens}": times.ratio.median for case, times in zip(tailed, found, strict=False)}
    return {"packing_gain": found[0].ratio.median, **of_size, "packing_gain_one_length": found[-1].ratio.median}


def head_memory(folder: Path) -> dict[str, float]:
    """Prompts grow, then completions, through a head whose chunks are of at most 4 MiB; beside it transformers' own logits."""
    prompts, completions = (32, 64, 128, 256, 512), (32, 64, 128, 256, 512)
    of_prompts = [peak_logits_bytes(folder / "1M", prompt_tokens=count, completion_tokens=32) for count in prompts]
    of_completions = [peak_logits_bytes(folder / "1M", prompt_tokens=32, completion_tokens=count) for count in completions]
    rows = [
        (length, *(f"{size / 2**20:.2f}" for pair in (prompt, completion) for size in pair))
        for length, prompt, completion in zip(prompts, of_prompts, of_completions, strict=True)
    ]
    slope = growth(prompts, [ours for ours, _ in of_prompts])
    plain = growth(prompts, [plain for _, plain in of_prompts])
    columns = ("tokens", "prompts grow: ours, MiB", "plain logits", "completions grow: ours, MiB", "plain logits")
    show(
        "Logits in memory at once, 8 sequences", columns, rows, f"over prompt length: ours ~ tokens^{slope:.2f}, plain ~ tokens^{plain:.2f}"
    )
    return {"head_memory_slope": slope, "plain_head_memory_slope": plain}


def main() -> None:
    """Make the models, measure, print the tables."""
    arguments = command_line(__doc__, "three rounds, without the largest model and most microbatch sizes").parse_args()
    rounds = 3 if arguments.quick else 7
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for size in GROUPS:
            make_model(folder, size)
        metrics = {**against_bare(folder, rounds, arguments.quick), **packing(folder, rounds), **head_memory(folder)}
    goals = (
        Goal(metric="ratio_to_bare_torch", at_least=RATIO_GOAL),
        Goal(metric="packing_gain", at_least=PACKING_GOAL),
        Goal(metric="head_memory_slope", at_least=-MAX_SLOPE, at_most=MAX_SLOPE),
    )
    finish(arguments, metrics, goals)


if __name__ == "__main__":
    main()

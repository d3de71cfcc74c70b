"""Tokens per second through the generator actor, against bare vLLM on the same prompts, seeds and engine arguments.

    python benchmarks/generator.py [--quick] [--json FILE] [--bare KEY=VALUE ...]

Ours: the real Ray actor at the end of the real produce loop (tickets in, groups out as they finish, log-probabilities, versions). The
queue grants tickets at once, and this process takes the groups in place of a scorer. Bare: a process with one LLMEngine that is given all
prompts of a round at once, so that its scheduler keeps every seat taken, and is stepped until all have ended; it does nothing with what
comes out. Both live at the same time, and only one of them works.

The policy is a stand-in with completions of a fixed length, and of a log-normal's (stand_in.py).
"""

import json
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from bare_vllm import Bare
from harness import Goal, Spread, command_line, finish, growth, in_turn, ratios, show
from stand_in import FIXED, LONG_TAILED, MAX_TOKENS, make_prompts, write_policy

from actors.session import open_session
from async_rlhf.config import Config
from async_rlhf.config.schema import GeneratorConfig, RunConfig
from async_rlhf.snapshot import snapshot_of_folder

if TYPE_CHECKING:
    from produce_alone import Ours

BATCHES = (8, 32, 64, 256)
COMPLETIONS = 4
GROUP_SIZES = (1, 4, 16)
GOAL_BATCH = 64
SAME = 0.01
"""How far the tokens of a round may be off: seeds decide all, but rounding depends on who is in the batch."""


def make_config(batch: int, size: int) -> Config:
    """One generator with room for `batch` completions, in groups of `size`."""
    generator = GeneratorConfig(max_inflight=batch, max_new_tokens=MAX_TOKENS, max_model_len=512, kv_cache_mib=512)
    return Config(completions_per_prompt=size, generator=generator, run=RunConfig(object_store_mib=128))


@contextmanager
def sides(ours: "Ours", bare: Bare) -> Generator[None]:
    """Both ready, and ended at the exit."""
    try:
        bare.ready()
        ours.ready()
        yield
    finally:
        ours.close()
        bare.close()


def rate(ends: Sequence[tuple[float, int]]) -> float:
    """Tokens per second of the middle half of the groups: a run of training neither begins nor ends all the time.

    From one arrival to another, as several groups arrive at once.
    """
    began, ended = ends[len(ends) // 4][0], ends[3 * len(ends) // 4][0]
    return sum(num_tokens for at, num_tokens in ends if began < at <= ended) / (ended - began)


def measure(ours: "Ours", bare: Bare, config: Config, kind: str, target_s: float, rounds: int) -> tuple[Spread, dict[str, list[float]]]:
    """Ours over bare, and tokens per second of each; as many prompts as bare vLLM needs about `target_s` for."""
    size = config.completions_per_prompt
    num = max(8, 2 * config.generator.max_inflight // size)
    bare.sample(make_prompts(kind, num))
    ends = bare.sample(make_prompts(kind, num))  # warm
    prompts = make_prompts(kind, max(2 * num, round(num * target_s / (ends[-1][0] - ends[0][0]))))
    expected = sum(num_tokens for _, num_tokens in bare.sample(prompts))

    def sample(side: "Ours | Bare") -> float:
        ends = side.sample(prompts)
        num_tokens = sum(num_tokens for _, num_tokens in ends)
        assert abs(num_tokens / expected - 1) < SAME, f"{side} sampled {num_tokens} tokens, bare vLLM before {expected}"
        return rate(ends)

    sample(ours)
    found = in_turn({"ours": lambda: sample(ours), "bare": lambda: sample(bare)}, rounds)
    return ratios(found["ours"], found["bare"]), found


def main() -> None:
    """Measure, print the tables, and write the metrics where asked."""
    parser = command_line(__doc__, "batches 8, 64 and 256, K = 4 alone, three rounds")
    parser.add_argument("--bare", nargs="*", default=[], metavar="KEY=VALUE", help="other arguments of the bare engine, in JSON")
    parser.add_argument("--batches", type=int, nargs="*", help="these alone")
    arguments = parser.parse_args()
    overrides = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in arguments.bare)}
    session = open_session()  # before Ray is imported
    from produce_alone import Ours

    from actors.environment import ACTOR_ENVIRONMENT
    from actors.launch import connect

    os.environ.update(ACTOR_ENVIRONMENT)
    batches = arguments.batches or ((8, GOAL_BATCH, 256) if arguments.quick else BATCHES)
    target_s, rounds = (1.5, 3) if arguments.quick else (2.0, 5)
    metrics: dict[str, float] = {}
    cells: dict[str, float] = {}
    rows: list[Sequence[object]] = []
    rates: dict[str, list[float]] = {}
    cluster = connect(make_config(GOAL_BATCH, COMPLETIONS), "benchmark", session)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_policy(Path(folder))
            weights = snapshot_of_folder(Path(folder), "float32")
            shapes = [(batch, COMPLETIONS) for batch in batches]
            if not arguments.quick and not arguments.batches:
                shapes += [(GOAL_BATCH, size) for size in GROUP_SIZES if size != COMPLETIONS]
            for batch, size in shapes:
                config = make_config(batch, size)
                ours, bare = Ours(cluster, Path(folder), config, weights), Bare(Path(folder), config, overrides)
                with sides(ours, bare):
                    for kind in (FIXED, LONG_TAILED):
                        ratio, found = measure(ours, bare, config, kind, target_s, rounds)
                        rows.append((kind, batch, size, Spread.of(found["ours"]), Spread.of(found["bare"]), ratio))
                        cells[f"{kind.replace('-', '_')}_{batch}_k{size}"] = ratio.median
                        if size == COMPLETIONS:
                            for name, values in found.items():
                                rates.setdefault(f"{kind} {name}", []).append(Spread.of(values).median)
                        print(*rows[-1], flush=True)
    finally:
        cluster.close()
    show("Tokens per second", ("lengths", "batch", "K", "ours", "bare vLLM", "ours / bare"), rows)
    if len(batches) > 1:
        show("tokens/s ~ batch^p", ("", "p"), [(name, growth(batches, values)) for name, values in rates.items()])
    goal = cells.get(f"long_tailed_{GOAL_BATCH}_k{COMPLETIONS}")
    metrics |= {f"ratio_{name}": value for name, value in cells.items()}
    metrics |= {"ratio_to_bare_vllm_median": float(np.median(list(cells.values()))), "ratio_to_bare_vllm_worst": min(cells.values())}
    if goal is not None:
        metrics["ratio_to_bare_vllm"] = goal
    finish(arguments, metrics, [Goal(metric="ratio_to_bare_vllm", at_least=0.95)])


if __name__ == "__main__":
    main()

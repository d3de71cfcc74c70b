"""1 to 4,096 generators on paper: what the queue, the broadcast of weights and the object store take, against the time that an update has.

    python benchmarks/scaling.py [--quick] [--json FILE] [--plot FILE.svg]

The fleet (FLEET, GIVEN) is assumed: a 7-billion-parameter policy, one GPU per generator and per rank, batches that grow with the fleet.
Its updates are simulated (async_rlhf/planning/model.py). What the queue costs is measured here: the real ReplayBuffer, Ledger and journal
in one process, without Ray, from a ticket's grant to its batch's booking, with groups of GROUP_COMPLETIONS completions. How long weights
travel is arithmetic over WEIGHTS_BYTES and LINK_BYTES_PER_S.
"""

import math
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Spread, command_line, finish, growth, in_turn, show

from async_rlhf.config import Config
from async_rlhf.config.algorithms import AlgorithmConfig
from async_rlhf.config.schema import GeneratorConfig, LearnerConfig, ScorerConfig
from async_rlhf.history import History
from async_rlhf.journal import Journal
from async_rlhf.planning.lengths import lognormal_lengths
from async_rlhf.planning.model import predict
from async_rlhf.planning.plot import draw_lines
from async_rlhf.planning.rates import Rates
from async_rlhf.prompts import PromptCursor
from async_rlhf.replay import ReplayBuffer
from async_rlhf.staleness import StalenessRule
from async_rlhf.tickets import ReplaySettings
from async_rlhf.types import FinishReason, Prompt, Rollout, RolloutGroup, ScoredGroup, Ticket, VersionSpan

GROUP_COMPLETIONS = 8
GROUPS_PER_GENERATOR = 32
MAX_STALENESS = 2
"""Of a batch: B = this x generators; an engine holds as many groups at once."""
MEDIAN_TOKENS, SIGMA, MAX_TOKENS, PROMPT_TOKENS = 400.0, 0.7, 2048, 200.0
GIVEN = Rates(
    engine_step_s=0.012,
    engine_completion_s=6e-5,
    train_token_s=1.05e-4,
    optimizer_s=0.05,
    allreduce_s=0.28,
    take_s=0.3,
    export_s=1.5,
    transfer_s=3.0,
    load_s=1.0,
    score_token_s=2e-6,
    call_s=0.005,
)
"""Assumed: 7e9 parameters, 6 flops per parameter and token at 4e14 flop/s on a rank; 14 GB of gradient at 50 GB/s; a step of 256
completions takes 27 ms."""
WEIGHTS_BYTES = 14e9
LINK_BYTES_PER_S = 25e9
"""Of a node: 200 Gbit/s."""
GENERATORS_PER_NODE = 8
TOKEN_BYTES = 12
"""Of a scored completion's token: id and two log-probabilities."""
FLEET = tuple(4**power for power in range(7))
MIN_GROUPS = 512
"""Put for a measurement of the queue."""
QUEUE_GENERATORS = (1, 16, 128)
"""At which the queue's cost is measured; between and beyond, a line in the number of live groups."""
NUM_ROUNDS = 5
COLUMNS = ("generators", "update s", "completions/s", "idle g/l", "queue s", "one node s", "doubling s", "groups GB", "simulated in s")


class Endless:
    """Prompts without end, all alike."""

    exhausted = False

    def __init__(self) -> None:
        self.cursor = PromptCursor(epoch=0, index=0)
        self._prompt = Prompt(prompt_id="p", text="a question" * 20, token_ids=np.zeros(int(PROMPT_TOKENS), dtype=np.int32))

    def draw(self) -> tuple[Prompt, int]:
        return self._prompt, 0


def scored(ticket: Ticket, version: int) -> ScoredGroup:
    """A group of median length."""
    tokens = int(MEDIAN_TOKENS)
    ids, logprobs = np.zeros(tokens, dtype=np.int32), np.zeros(tokens, dtype=np.float32)
    rollout = Rollout(
        completion_ids=ids,
        behavior_logprobs=logprobs,
        version_spans=(VersionSpan(version=version, start=0, end=tokens),),
        finish_reason=FinishReason.STOP,
    )
    return ScoredGroup(
        group=RolloutGroup(ticket=ticket, rollouts=(rollout,) * GROUP_COMPLETIONS),
        scores=np.arange(GROUP_COMPLETIONS, dtype=np.float32),
        reference_logprobs=(logprobs,) * GROUP_COMPLETIONS,
        completions=("an answer " * 100,) * GROUP_COMPLETIONS,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueCost:
    """Of buffer and journal, in one process without Ray."""

    grant_s: float
    """Per ticket."""
    put_s: float
    """Per group: marked as sampled, put, and its share of the batch's decision and booking."""
    num_decisions: int

    @property
    def group_s(self) -> float:
        """From its ticket to its batch."""
        return self.grant_s + self.put_s


def queue_cost(batch_groups: int, *, journaled: bool) -> QueueCost:
    """CPU time that the queue spends on tickets and groups: at least one whole batch is granted, put, decided and trained.

    Requests come as generators make them: GROUPS_PER_GENERATOR at a time, and while a batch comes in the tickets of the next one go out.
    """
    config = Config(batch_groups=batch_groups)
    with tempfile.TemporaryDirectory() as folder:
        history = None
        if journaled:
            identity = {"batch_groups": batch_groups, "max_staleness": MAX_STALENESS}
            history = History(Journal(Path(folder) / "journal"), config.reward, identity, 0)
        rule = StalenessRule(batch_groups=batch_groups, max_staleness=MAX_STALENESS)
        settings = ReplaySettings(num_updates=1000)
        buffer = ReplayBuffer(rule, Endless(), settings, history.ledger if history is not None else None)
        size, waiting = min(GROUPS_PER_GENERATOR, batch_groups), deque[Ticket]()
        grant_s = put_s = 0.0
        num_granted = num_put = update = 0

        def grant() -> float:
            """Seconds; nothing is granted where as many as may be are on their way."""
            nonlocal num_granted
            began = time.process_time()
            tickets = buffer.grant("g", update, size, 0.0)
            if history is not None:
                history.flush()
            waiting.extend(tickets)
            num_granted += len(tickets)
            return time.process_time() - began

        while num_granted < (MAX_STALENESS + 1) * batch_groups:
            grant_s += grant()
        while update < max(1, MIN_GROUPS // batch_groups):
            share = [waiting.popleft() for _ in range(size)]
            groups = [scored(ticket, update) for ticket in share]
            began = time.process_time()
            buffer.mark_scoring(share, 0.0)
            for group in groups:
                buffer.put(group)
            if buffer.decide() is not None:
                buffer.mark_trained(update)
                update += 1
            if history is not None:
                history.flush()
            put_s += time.process_time() - began
            num_put += size
            grant_s += grant()
        return QueueCost(grant_s=grant_s / num_granted, put_s=put_s / num_put, num_decisions=update)


def fleet(generators: int) -> Config:
    """The assumed run of that size: as many ranks as generators."""
    return Config(
        batch_groups=GROUPS_PER_GENERATOR * generators,
        completions_per_prompt=GROUP_COMPLETIONS,
        max_staleness=MAX_STALENESS,
        algorithm=AlgorithmConfig(name="rloo"),  # trains on every completion
        generator=GeneratorConfig(count=generators, max_inflight=256, max_new_tokens=MAX_TOKENS, max_model_len=4096),
        learner=LearnerConfig(num_ranks=generators),
        scorer=ScorerConfig(count=max(1, generators // 8)),
    )


def broadcast_s(generators: int) -> tuple[float, float]:
    """Seconds until every node has a version: all from one node, and in doubling rounds. One node needs none."""
    nodes = math.ceil(generators / GENERATORS_PER_NODE)
    one_s = WEIGHTS_BYTES / LINK_BYTES_PER_S
    return (nodes - 1) * one_s, math.ceil(math.log2(nodes)) * one_s if nodes > 1 else 0.0


def measure_queue(sizes: Sequence[int]) -> tuple[float, float, dict[str, float]]:
    """Seconds per group, fixed and per group of the batch: a line through what batches of these sizes cost; and what is written of it."""
    queue_cost(sizes[0], journaled=True)  # imports
    rounds = in_turn({f"{size}": lambda size=size: queue_cost(size, journaled=True).group_s for size in sizes}, NUM_ROUNDS)
    bare = in_turn({f"{size}": lambda size=size: queue_cost(size, journaled=False).group_s for size in sizes}, NUM_ROUNDS)
    costs = {size: Spread.of(rounds[f"{size}"]) for size in sizes}
    rows = [(size, *(f"{1e3 * Spread.of(each[f'{size}']).median:.3f}" for each in (rounds, bare))) for size in sizes]
    medians = [costs[size].median for size in sizes]
    exponent = growth(sizes, medians)
    slope, fixed = np.polyfit(sizes, medians, 1)
    note = f"medians of {NUM_ROUNDS} rounds; the cost of a group grows with B to the power of {exponent:.2f}"
    show("buffer and journal in one process, without Ray: ms per group", ("B", "with the journal", "without"), rows, note)
    metrics = {"queue_fixed_s": float(fixed), "queue_per_batch_group_s": float(slope), "queue_growth": exponent}
    return float(fixed), float(slope), metrics


def main() -> None:
    """Measure, simulate, print the tables, and write the numbers and the plot where asked."""
    parser = command_line(__doc__, "64 generators and more")
    parser.add_argument("--plot", type=Path, help="where to draw it")
    arguments = parser.parse_args()
    sizes = [GROUPS_PER_GENERATOR * num for num in QUEUE_GENERATORS]
    fixed, slope, metrics = measure_queue(sizes)
    rows: list[tuple[object, ...]] = []
    lines: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("an update", "queue", "weights from one node", "weights, doubling")
    }
    for generators in FLEET[:3] if arguments.quick else FLEET:
        config, began = fleet(generators), time.perf_counter()
        lengths = lognormal_lengths(median=MEDIAN_TOKENS, sigma=SIGMA, prompt_tokens=PROMPT_TOKENS, config=config)
        found = predict(config, GIVEN, lengths, num_updates=12)
        simulated_s = time.perf_counter() - began
        queue_s = config.batch_groups * max(fixed + slope * config.batch_groups, 0.0)
        one_s, doubling_s = broadcast_s(generators)
        group_bytes = GROUP_COMPLETIONS * lengths.mean_tokens * TOKEN_BYTES * (MAX_STALENESS + 1) * config.batch_groups
        idle = f"{found.generator_idle:.0%}/{found.learner_idle:.0%}"
        beyond = "*" if config.batch_groups > sizes[-1] else ""
        times = (f"{queue_s:.1f}{beyond}", f"{one_s:.1f}", f"{doubling_s:.1f}")
        cells = (f"{found.update_s:.1f}", f"{found.completions_per_s:,.0f}", idle, *times, f"{group_bytes / 1e9:.2f}")
        rows.append((generators, *cells, f"{simulated_s:.1f}"))
        values = (found.update_s, queue_s, one_s, doubling_s)
        for line, value in zip(lines.values(), values, strict=True):
            if value > 0:
                line.append((generators, value))
        metrics |= {f"{name.replace(' ', '_')}_{generators}_s": value for name, value in zip(lines, values, strict=True)}
    show("fleets, per update", COLUMNS, rows, f"* beyond B {sizes[-1]}, the largest measured: the line goes on")
    if arguments.plot:
        arguments.plot.write_text(draw_lines(lines, "generators", "seconds per update", logarithmic=True), encoding="utf-8")
    finish(arguments, metrics)


if __name__ == "__main__":
    main()

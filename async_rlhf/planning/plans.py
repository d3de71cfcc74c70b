"""Plans compared: the pipeline's model run for several numbers of generators and ranks, and bounds; and the best split of a budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from async_rlhf.config import Config
from async_rlhf.config.checks import check_config
from async_rlhf.errors import ConfigError
from async_rlhf.planning.lengths import Lengths
from async_rlhf.planning.model import predict
from async_rlhf.planning.prediction import Prediction
from async_rlhf.planning.rates import Rates, num_trained

Unit = Literal["gpus", "cores"]

MAX_PLANS = 100
"""Simulated in one go: a second or two each."""
NUM_SPLITS = 4
"""Splits of a budget that are simulated: those of the shortest ideal update."""
BOUNDS = (1, 2, 4)
"""Bounds on the staleness that a recommendation chooses among; more costs learning."""
NEARLY = 0.98
"""Of the best throughput: what gets so near with a tighter bound is preferred."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A config, and what it would do."""

    config: Config
    prediction: Prediction

    @property
    def name(self) -> str:
        """Generators, ranks and bound."""
        return f"{self.config.generator.count} + {self.config.learner.num_ranks}, bound {self.config.max_staleness}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """What plans are made from."""

    config: Config
    rates: Rates
    lengths: Lengths
    num_cores: float = math.inf
    """That all processes share; see predict."""

    def plan(self, config: Config) -> Plan:
        """What `config` would do."""
        return Plan(config=config, prediction=predict(config, self.rates, self.lengths, num_cores=self.num_cores))


def with_members(config: Config, *, generators: int, ranks: int, bound: int) -> Config:
    """The config with other numbers.

    Raises:
        ConfigError: it does not take them.
    """
    changed = replace(
        config,
        max_staleness=bound,
        generator=replace(config.generator, count=generators),
        learner=replace(config.learner, num_ranks=ranks),
    )
    check_config(changed)
    return changed


def compare(basis: Basis, *, generators: Sequence[int], ranks: Sequence[int], bounds: Sequence[int]) -> list[Plan]:
    """A plan for each combination, in order.

    Raises:
        ConfigError: more than MAX_PLANS, or numbers that the config does not take.
    """
    combinations = [(num, rank, bound) for bound in bounds for rank in ranks for num in generators]
    if len(combinations) > MAX_PLANS:
        raise ConfigError(f"{len(combinations)} combinations are more than the {MAX_PLANS} that are simulated at once; ask for fewer")
    configs = [with_members(basis.config, generators=num, ranks=rank, bound=bound) for num, rank, bound in combinations]
    return [basis.plan(each) for each in configs]


def recommend(basis: Basis, budget: int, unit: Unit) -> tuple[Plan, list[Plan]]:
    """The best split of `budget` between generators and ranks, with its bound; and all plans that were compared.

    Scorers and reward actors keep their number. Of the plans that come within NEARLY of the most updates per hour, the one of
    the tightest bound and then of the fewest generators.
    Raises:
        ConfigError: the budget does not hold one generator and one rank.
    """
    config = basis.config
    splits = _splits(config, budget, unit)
    splits.sort(key=lambda split: _ideal_s(basis, *split))
    bounds = sorted({*BOUNDS, max(1, config.max_staleness)})
    plans = [
        basis.plan(each)
        for generators, ranks in splits[:NUM_SPLITS]
        for each in (with_members(config, generators=generators, ranks=ranks, bound=bound) for bound in bounds)
    ]
    most = max(plan.prediction.updates_per_h for plan in plans)
    good = [plan for plan in plans if plan.prediction.updates_per_h >= NEARLY * most]
    return min(good, key=lambda plan: (plan.config.max_staleness, plan.config.generator.count)), plans


def _splits(config: Config, budget: int, unit: Unit) -> list[tuple[int, int]]:
    """(generators, ranks) that use the budget up, ranks as the batch allows."""
    parts = (config.generator, config.learner, config.scorer, config.reward)
    generator, rank, scorer, reward = ((part.num_gpus if unit == "gpus" else part.num_cpus) for part in parts)
    generator, rank = generator or 1.0, rank or 1.0  # without a number in the config: one each
    rest = budget - scorer * config.scorer.count - reward * config.reward.count
    if _whole(rest - generator, rank) < 1:
        beside = f", scorers and rewards {scorer * config.scorer.count + reward * config.reward.count:g}" if scorer or reward else ""
        raise ConfigError(
            f"a budget of {budget} {unit} does not hold a generator ({generator:g}) and a learner rank ({rank:g}){beside}; give more"
        )
    shards = config.batch_groups // config.algorithm.minibatches_per_batch
    ranks = [num for num in range(1, min(shards, _whole(rest - generator, rank)) + 1) if shards % num == 0]
    most = (max(BOUNDS) + 1) * config.batch_groups
    splits = [(min(_whole(rest - rank * num, generator), most, 4096), num) for num in ranks]
    return [(generators, num) for generators, num in splits if generators]


def _whole(budget: float, each: float) -> int:
    """How many that need `each` fit; shares of GPUs are not exact in binary."""
    return math.floor(budget / each + 1e-9)


def _ideal_s(basis: Basis, generators: int, ranks: int) -> float:
    """Seconds of an update if nobody waited for anybody but the slowest stage."""
    config, rates, lengths = basis.config, basis.rates, basis.lengths
    size, groups = config.completions_per_prompt, config.batch_groups
    algorithm = config.algorithm
    learn_s = rates.train_step_s(
        groups * num_trained(config) * lengths.mean_sequence_tokens,
        ranks=ranks,
        epochs=algorithm.epochs_per_batch,
        minibatches=algorithm.minibatches_per_batch,
    )
    tied = min(float(lengths.tied.mean()), 0.999)
    sampled = groups + min(groups * tied / (1 - tied), config.max_replacements_per_batch)
    running = min(config.generator.max_inflight, max(BOUNDS) * groups * size / generators)
    per_s = running / (rates.engine_step_s + rates.engine_completion_s * running)
    sample_s = sampled * size * lengths.mean_tokens / (generators * per_s) + rates.load_s
    return max(sample_s, rates.take_s + learn_s + rates.export_s + rates.book_s)

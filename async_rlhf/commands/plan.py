"""`async-rlhf plan`: what other numbers of generators and ranks would do, from the rates of runs or from given ones."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from async_rlhf.commands.say import say
from async_rlhf.config import Config, load_config
from async_rlhf.config.load import split_arguments
from async_rlhf.errors import ConfigError
from async_rlhf.recorder import rows_of_config
from async_rlhf.stage_times import stage_times
from async_rlhf.state import write_atomically

if TYPE_CHECKING:
    from async_rlhf.planning.plans import Basis, Plan
    from async_rlhf.planning.rates import Rates


COLUMNS = (
    "gener-\nators",
    "ranks",
    "bound",
    "updates\nper h",
    "compl.\nper s",
    "gener.\nidle",
    "scorer\nidle",
    "learner\nidle",
    "stale-\nness",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What to plan for, and where to write it."""

    rates: Path | None = None
    generators: str = ""
    ranks: str = ""
    bounds: str = ""
    gpus: int = 0
    cores: int = 0
    shared_cores: int = 0
    """Of the machine that all processes run on, now and in the plans; 0: each has its own."""
    median_tokens: float = 0.0
    """0: as long as the run's completions were."""
    sigma: float = 0.5
    prompt_tokens: float = 0.0
    json: Path | None = None
    plot: Path | None = None


def run_plan(words: Sequence[str], wishes: Wishes, console: Console) -> None:
    """Simulate, print a table, and write what was asked for.

    Raises:
        ConfigError: no run and no rates, a run too short to measure, numbers that no run could have.
    """
    from async_rlhf.planning.plans import compare, recommend

    runs, config = _inputs(words)
    basis, rows = _basis(runs, config, wishes)
    if wishes.gpus and wishes.cores:
        raise ConfigError("--gpus and --cores both give the budget; choose one")
    best = None
    if wishes.gpus or wishes.cores:
        best, plans = recommend(basis, wishes.gpus or wishes.cores, "gpus" if wishes.gpus else "cores")
    else:
        count = config.generator.count
        plans = compare(
            basis,
            generators=_numbers("--generators", wishes.generators) or sorted({min(factor * count, 4096) for factor in (1, 2, 4)}),
            ranks=_numbers("--ranks", wishes.ranks) or [config.learner.num_ranks],
            bounds=_numbers("--bounds", wishes.bounds, least=0) or [config.max_staleness],
        )
    for text in assumptions(runs[0] if runs else None, config, wishes):
        say(console, f"warning: {text}", style="yellow")
    console.print(_table(plans, best, scorers_known=basis.rates.score_call_s + basis.rates.score_token_s > 0))
    _show(console, plans, best, stage_times(rows, window=len(rows)))
    if wishes.json is not None:
        write_atomically(wishes.json, json.dumps(_as_json(plans, best, basis.rates), indent=2) + "\n")
    if wishes.plot is not None:
        from async_rlhf.planning.plot import draw_plans

        write_atomically(wishes.plot, draw_plans(plans))
        say(console, f"plot: {wishes.plot}")


def _inputs(words: Sequence[str]) -> tuple[list[Path], Config]:
    """The runs, and the first one's config with what was said besides."""
    runs = [Path(word) for word in words if "=" not in word and Path(word).is_dir()]
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"{run} is no run folder: it has no config.yaml; give the folder that `train` printed")
    files, overrides = split_arguments([word for word in words if Path(word) not in runs])
    return runs, load_config([*(run / "config.yaml" for run in runs[:1]), *files], overrides).config


def _basis(runs: Sequence[Path], config: Config, wishes: Wishes) -> "tuple[Basis, Sequence[Mapping[str, float]]]":
    """Rates (of several runs their mean) and lengths, given ones before measured ones; and the first run's rows."""
    from async_rlhf.planning.lengths import lognormal_lengths, measured_lengths
    from async_rlhf.planning.model import calibrated_rates
    from async_rlhf.planning.plans import Basis
    from async_rlhf.planning.rates import averaged, read_rates

    if not runs and wishes.rates is None:
        raise ConfigError("nothing to plan from: give a run folder, or rates (--rates FILE.yaml) with --median-tokens")
    configs = [load_config([run / "config.yaml"]).config for run in runs]
    if wishes.median_tokens:
        lengths = lognormal_lengths(median=wishes.median_tokens, sigma=wishes.sigma, prompt_tokens=wishes.prompt_tokens, config=config)
    elif not runs:
        raise ConfigError("without a run the lengths of completions are not known; give --median-tokens (and --sigma, --prompt-tokens)")
    else:
        lengths = measured_lengths(runs[0], configs[0])
    rows, num_cores = [rows_of_config(run) for run in runs], wishes.shared_cores or math.inf
    if wishes.rates is not None:
        rates = read_rates(wishes.rates)
    else:
        measured = zip(runs, configs, rows, strict=True)
        rates = averaged([calibrated_rates(own_rows, own, measured_lengths(run, own), num_cores) for run, own, own_rows in measured])
    return Basis(config=config, rates=rates, lengths=lengths, num_cores=num_cores), rows[0] if rows else []


def assumptions(run: Path | None, config: Config, wishes: Wishes) -> list[str]:
    """What the plans assume and nobody said."""
    found: list[str] = []
    uncounted = [name for name, part in (("generator", config.generator), ("learner", config.learner)) if not part.num_gpus]
    if wishes.gpus and uncounted:
        names = " and ".join(f"{name}.num_gpus" for name in uncounted)
        found.append(f"{names} 0 in the config: one GPU each is counted, at the speed that was measured or given without one")
    if run is None or wishes.rates is not None or wishes.shared_cores:
        return found
    own = load_config([run / "config.yaml"]).config
    if not any(part.num_gpus for part in (own.generator, own.learner, own.scorer, own.reward)):
        found.append(
            "the run used no GPU, and every process is taken to have had, and to get, cores of its own; if they shared those of one "
            "machine, give --shared-cores"
        )
    return found


def _numbers(option: str, text: str, least: int = 1) -> list[int]:
    """`1,2,4` as numbers."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} must be whole numbers with commas between them, got {text!r}") from None
    if any(number < least for number in numbers):
        raise ConfigError(f"{option} must be numbers >= {least}, got {text!r}")
    return numbers


def _table(plans: "Sequence[Plan]", best: "Plan | None", *, scorers_known: bool) -> Table:
    table = Table(title="predicted (staleness: mean/largest)", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for plan in plans:
        found, config = plan.prediction, plan.config
        table.add_row(
            str(config.generator.count),
            str(config.learner.num_ranks),
            str(config.max_staleness),
            f"{found.updates_per_h:,.0f}",
            f"{found.completions_per_s:,.1f}",
            f"{found.generator_idle:.0%}",
            f"{found.scorer_idle:.0%}" if scorers_known else "-",
            f"{found.learner_idle:.0%}",
            f"{found.staleness_mean:.2f}/{max(found.staleness, default=0)}",
            style="bold" if plan is best else "",
        )
    return table


def _show(console: Console, plans: "Sequence[Plan]", best: "Plan | None", times: Any) -> None:
    if times is not None:
        idle = f"generators idle {times.generators_idle:.0%}, learner idle {times.learner_idle:.0%}"
        say(console, f"measured in the run: {3600 / times.update_s:,.0f} updates/h, {idle}")
    if best is not None:
        config = best.config
        say(
            console,
            f"recommended: generator.count={config.generator.count} learner.num_ranks={config.learner.num_ranks} "
            f"max_staleness={config.max_staleness} ({best.prediction.updates_per_h:,.0f} updates/h)",
        )


def _as_json(plans: "Sequence[Plan]", best: "Plan | None", rates: "Rates") -> Mapping[str, Any]:
    from async_rlhf.planning.rates import as_mapping

    return {
        "rates": dict(as_mapping(rates)),
        "plans": [
            {
                "generators": plan.config.generator.count,
                "ranks": plan.config.learner.num_ranks,
                "max_staleness": plan.config.max_staleness,
                "updates_per_h": plan.prediction.updates_per_h,
                "completions_per_s": plan.prediction.completions_per_s,
                "tokens_per_s": plan.prediction.tokens_per_s,
                "generator_idle_share": plan.prediction.generator_idle,
                "scorer_idle_share": plan.prediction.scorer_idle,
                "reward_idle_share": plan.prediction.reward_idle,
                "learner_idle_share": plan.prediction.learner_idle,
                "staleness": {str(staleness): share for staleness, share in plan.prediction.staleness.items()},
                "recommended": plan is best,
            }
            for plan in plans
        ],
    }

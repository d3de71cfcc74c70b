"""How close an update comes to its ideal, in which sampling, scoring, training and weights overlap and nothing costs anything besides.

    python benchmarks/overlap.py [--quick] [--only balanced] [--json FILE]

Three regimes, by completions per prompt and passes over a batch: one bound by generation, one balanced, one bound by training. In each

    efficiency = ideal / measured seconds of an update,    ideal = max(t_gen, t_learn + t_gather + t_score)

where the parts of the ideal are measured apart (stages.py: without Ray, queue and driver, the other core as busy as in a run), before and
(without --quick) after the runs, and the update in real runs (`async-rlhf train`, pipeline_runs.py), from the first settled update to the
last one beside which tickets still go out. One generator, one learner rank and one scorer on two cores: the scorer shares the learner's.
Both are of completions as long as the run's. Where the generator's core has time left the scorer uses it, so training-bound runs may be
faster than that ideal; `efficiency_free` is against the stricter one that a scheduler without any cost would reach, max(t_gen, t_learn +
t_gather, half of everything). `throughput_s1` is synchronous training's update (`max_staleness` 0, the same processes) over that of 1.

A policy of random weights and 0.9M parameters, prompts of 4 to 6 tokens, completions that end by chance (geometric, 55 tokens in the mean,
at most 128): updates of two to five seconds. The tables of growth have other batches, and a policy of 5M parameters. Checkpoints and
evaluations are left out.

Not in the ideal: each generator installs each version, and reads what it is in the middle of anew under it; `install s` is that. With
`weights.on_update: keep_cache` it does not read anew: a table compares the two, in turn, where generation bounds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from harness import CHECKOUT, Goal, Spread, command_line, console, finish, growth, in_turn, show
from pipeline_runs import Measured, run_pipeline
from stages import StageTimes, make_start, measure_stages

COMMON = [
    "algorithm=dpo",
    "learner.learning_rate=1e-6",
    f"reward.function={CHECKOUT / 'benchmarks' / 'stages.py'}:score",
    "generator.max_new_tokens=128",
    "generator.max_model_len=256",
    "generator.max_inflight=128",
]
REGIMES: Mapping[str, Sequence[str]] = {
    "generation_bound": ["batch_groups=32", "completions_per_prompt=8"],
    "balanced": ["batch_groups=64", "completions_per_prompt=4", "algorithm.epochs_per_batch=2"],
    "training_bound": ["batch_groups=64", "completions_per_prompt=4", "algorithm.epochs_per_batch=5"],
}
GROWTH = (8, 24)
"""Batches, beside that of the balanced regime."""
POLICY, LARGER_POLICY = {"hidden_size": 128, "num_layers": 4}, {"hidden_size": 256, "num_layers": 6}
"""Of 0.9 and of 5 million parameters."""
LARGER = ["batch_groups=32", "completions_per_prompt=4", "generator.max_inflight=64"]
"""Balances the larger policy."""
STALENESS = (2, 1, 4, 0)
"""Of the goal, of the others, and of synchronous training, in which the stages take turns."""
SKIPPED, QUICK_SKIPPED = 3, 2
"""Updates until the queue is full and the engines are warm."""
MEASURED_UPDATES, QUICK_UPDATES = 6, 3
STAGE_S, QUICK_STAGE_S = 6.0, 4.0
READINGS = (
    "queue/wait_s",
    "train/take_s",
    "train/step_s",
    "weights/export_s",
    "weights/install_s",
    "weights/pause_s",
    "weights/canary_s",
    "score/latency_s",
    "generate/wait_ticket_share",
    "generate/running_requests",
    "generate/waiting_requests",
    "queue/staleness_mean",
)
INSTALLS = ("weights/install_s", "weights/pause_s", "weights/canary_s")
KEEPING_ROUNDS = 3
BLOCKS = 3
"""Into which a run's updates are cut, for the spread."""


class Bench:
    """Runs and stages of one policy, that of `shape`."""

    def __init__(self, folder: Path, quick: bool, shape: Mapping[str, int]) -> None:
        self._start = make_start(folder, **shape)
        self._quick = quick

    def stages(self, settings: Sequence[str]) -> StageTimes:
        return measure_stages([*COMMON, *settings], self._start, QUICK_STAGE_S if self._quick else STAGE_S)

    def run(self, settings: Sequence[str], max_staleness: int) -> Measured:
        tail = max_staleness + 1
        skipped, measured = (QUICK_SKIPPED, QUICK_UPDATES) if self._quick else (SKIPPED, MEASURED_UPDATES)
        fixed = [f"model.path={self._start}", f"max_staleness={max_staleness}"]
        return run_pipeline([*COMMON, *settings, *fixed], updates=skipped + measured + tail, skip=skipped, tail=tail)


def mean_of(measured: Sequence[StageTimes]) -> StageTimes:
    """Part by part."""
    names = StageTimes.__dataclass_fields__
    return StageTimes(**{name: statistics.fmean(getattr(each, name) for each in measured) for name in names})


def for_run(times: StageTimes, run: Measured) -> StageTimes:
    """For completions as long as the run's were."""
    return times.at(run.mean("rollout/length_tokens"))


def efficiency(measured: Sequence[StageTimes], run: Measured) -> Spread:
    """Of the whole run; the lowest ideal over its worst block of updates; the highest over its best."""
    ideals, blocks = [for_run(times, run).ideal_s for times in measured], run.blocks_s(BLOCKS)
    return Spread(for_run(mean_of(measured), run).ideal_s / run.update_s, min(ideals) / max(blocks), max(ideals) / min(blocks))


def measure_regimes(bench: Bench, names: Sequence[str], staleness: Sequence[int]) -> tuple[dict[str, float], dict[str, Measured]]:
    """Print the main table; the metrics, and each regime's run at the first staleness."""
    metrics: dict[str, float] = {}
    rows: list[Sequence[object]] = []
    runs: dict[str, Measured] = {}
    for name in names:
        settings = REGIMES[name]
        before = bench.stages(settings)
        console(f"{name}: {before}")
        of_name: dict[int, Measured] = {}
        for eta in staleness:
            of_name[eta] = bench.run(settings, eta)
            console(f"{name}, staleness {eta}: {of_name[eta].update_s:.3f} s, ideal {for_run(before, of_name[eta]).ideal_s:.3f} s")
        stages = [before] if len(staleness) == 1 else [before, bench.stages(settings)]
        runs[name] = of_name[staleness[0]]
        times = for_run(mean_of(stages), runs[name])
        cells: list[object] = []
        for eta, run in sorted(of_name.items()):
            found = efficiency(stages, run)
            suffix = "" if eta == STALENESS[0] else f"_staleness_{eta}"
            metrics |= {f"efficiency_{name}{suffix}": found.median, f"update_s_{name}{suffix}": run.update_s}
            cells.append(found)
        if {0, 1} <= of_name.keys():
            metrics[f"throughput_s1_{name}"] = of_name[0].update_s / of_name[1].update_s
        metrics[f"efficiency_free_{name}"] = times.free_ideal_s / runs[name].update_s
        parts = (times.generate_s, times.train_s, times.gather_s, times.score_s)
        idle = f"{runs[name].mean('generate/idle_share'):.0%}/{runs[name].mean('train/idle_share'):.0%}"
        seconds = (times.ideal_s, runs[name].mean("weights/install_s"), runs[name].update_s)
        rows.append((name, *(f"{part:.2f}" for part in (*parts, *seconds)), idle, *cells))
    columns = ("regime", "t_gen", "t_learn", "t_gather", "t_score", "ideal s", "install s", "update s", "idle g/l")
    show(
        "Efficiency: ideal / measured", (*columns, *(f"staleness {eta}" for eta in sorted(staleness))), rows, "update s, idle: staleness 2"
    )
    return metrics, runs


def measure_keeping(bench: Bench) -> dict[str, float]:
    """The generation-bound regime again, and in turn with it the one in which nothing is read anew."""
    settings = REGIMES["generation_bound"]
    ways = {way: partial(bench.run, [*settings, f"weights.on_update={way}"], STALENESS[0]) for way in ("keep", "keep_cache")}
    runs = in_turn(ways, KEEPING_ROUNDS)
    times = bench.stages(settings)
    found = {way: Spread.of([for_run(times, run).ideal_s / run.update_s for run in of_way]) for way, of_way in runs.items()}
    means = {way: [statistics.fmean(run.mean(key) for run in of_way) for key in INSTALLS] for way, of_way in runs.items()}
    rows = [(way, *means[way], statistics.fmean(run.update_s for run in of_way), found[way]) for way, of_way in runs.items()]
    show("Generation-bound by weights.on_update, in turn, staleness 2", ("", *INSTALLS, "update s", "efficiency"), rows)
    return {f"efficiency_generation_bound_{way}": spread.median for way, spread in found.items()}


def show_profile(runs: Mapping[str, Measured]) -> dict[str, float]:
    """Who spends how much CPU on an update; all of it over what two cores have, and what is neither of the three stages."""
    kinds = sorted({kind for run in runs.values() for kind in run.cpu_s}, key=lambda kind: -max(run.cpu_s[kind] for run in runs.values()))
    rows: list[Sequence[object]] = [(kind, *(f"{run.cpu_s[kind]:.3f}" for run in runs.values())) for kind in kinds]
    rows.append(("all", *(f"{sum(run.cpu_s.values()):.3f}" for run in runs.values())))
    show("Seconds of CPU per update, staleness 2", ("process", *runs), rows)
    rows = [("update s", *(f"{run.update_s:.3f}" for run in runs.values()))]
    rows += [(key, *(f"{run.mean(key):.3f}" for run in runs.values())) for key in READINGS]
    show("Where an update's time goes, staleness 2", ("reading", *runs), rows, "means of the rows of metrics.jsonl")
    besides = {
        name: sum(of for kind, of in run.cpu_s.items() if kind not in ("generator", "learner", "scorer")) for name, run in runs.items()
    }
    return {f"overhead_cpu_share_{name}": besides[name] / run.update_s for name, run in runs.items()}


def measure_growth(bench: Bench, largest: Measured) -> dict[str, float]:
    """The balanced regime with smaller batches."""
    of_balanced = dict(setting.split("=") for setting in REGIMES["balanced"])
    sizes = [*GROWTH, int(of_balanced.pop("batch_groups"))]
    settings = [f"{key}={value}" for key, value in of_balanced.items()]
    metrics: dict[str, float] = {}
    rows: list[Sequence[object]] = []
    seconds: list[float] = []
    ideals: list[float] = []
    for size in sizes:
        wanted = [*settings, f"batch_groups={size}"]
        run = largest if size == sizes[-1] else bench.run(wanted, STALENESS[0])
        times = for_run(bench.stages(wanted), run)
        seconds.append(run.update_s)
        ideals.append(times.ideal_s)
        rows.append((size, times.ideal_s, run.update_s, efficiency([times], run)))
        metrics[f"efficiency_at_{size}_groups"] = times.ideal_s / run.update_s
    slopes = f"groups ^ {growth(sizes, seconds):.2f} measured, ^ {growth(sizes, ideals):.2f} ideal"
    show("The balanced regime as the batch grows, staleness 2", ("groups", "ideal s", "update s", "efficiency"), rows, slopes)
    return metrics | {"growth_measured": growth(sizes, seconds), "growth_ideal": growth(sizes, ideals)}


def measure_larger(bench: Bench) -> dict[str, float]:
    """A balanced run of a policy whose steps take longer, so that calls weigh less, and reading anew weighs more."""
    run = bench.run(LARGER, STALENESS[0])
    times = for_run(bench.stages(LARGER), run)
    found = efficiency([times], run)
    columns = ("policy", "t_gen", "t_learn", "t_score", "ideal s", "install s", "update s", "efficiency")
    parts = (times.generate_s, times.train_s, times.score_s, times.ideal_s, run.mean("weights/install_s"), run.update_s)
    show("A larger policy, balanced, staleness 2", columns, [("5M", *(f"{part:.2f}" for part in parts), found)])
    return {"efficiency_of_a_larger_policy": found.median}


def main() -> None:
    """Measure, print the tables, and write the numbers where asked."""
    parser: argparse.ArgumentParser = command_line(__doc__, "staleness 2 alone, fewer updates, no growth")
    parser.add_argument("--only", choices=tuple(REGIMES), help="one regime")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(REGIMES)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary) / "start", arguments.quick, POLICY)
        metrics, runs = measure_regimes(bench, names, STALENESS[:1] if arguments.quick else STALENESS)
        metrics |= show_profile(runs)
        if not arguments.quick and "generation_bound" in runs:
            metrics |= measure_keeping(bench)
        if not arguments.quick and "balanced" in runs:
            metrics |= measure_growth(bench, runs["balanced"])
            metrics |= measure_larger(Bench(Path(temporary) / "larger", arguments.quick, LARGER_POLICY))
    console(f"updates measured per run: {QUICK_UPDATES if arguments.quick else MEASURED_UPDATES}")
    finish(arguments, metrics, [Goal(metric=f"efficiency_{name}", at_least=0.95) for name in names])


if __name__ == "__main__":
    main()

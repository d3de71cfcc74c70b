"""Does a run keep its contract when its processes are killed and frozen, again and again?

    python benchmarks/chaos.py [--faults 100] [--seed 0] [--per-run 12] [--quick] [--json FILE] [--keep FOLDER]

Runs one after another, each under random faults at random moments (tests/support/chaos.py), until there were enough of them; each
run is audited. Before them one run without faults, whose accuracy the others are compared with. Prints one table. About 15 s per
fault on two cores. Exit 1: anything lost, trained twice, beyond the staleness bound, hanging, left behind, or otherwise wrong.
"""

import math
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from harness import CHECKOUT, Goal, command_line, console, finish, show

sys.path.insert(0, str(CHECKOUT))

from tests.support.chaos import DOUBLE_FAULTS, FAULTS, ChaosResult, FaultResult, disturb

UPDATES_PER_FAULT = 25
"""A run is this much longer for each fault: most of them do not stop it from training."""
QUICK_FAULTS = 3
DOUBLE_SHARE = 0.2
"""Of the faults kill two parts at once."""
COUNTS = ("lost", "duplicated", "hangs", "bound_violations", "orphans")
HELD_OUT = 500
"""Problems of an evaluation; the number of the quickstart, whose start is in the cache of whoever ran it; good to about 0.022."""


def main() -> None:
    """Run, print, and write what was asked for."""
    parser = command_line(__doc__, quick=f"{QUICK_FAULTS} faults in one run")
    parser.add_argument("--faults", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="decides which, and when (default 0)")
    parser.add_argument("--per-run", type=int, default=12, help="faults in one run (default 12)")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which stay there; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.faults < 1 or arguments.per_run < 1:
        parser.error("--faults and --per-run must be >= 1")
    num_faults = min(arguments.faults, QUICK_FAULTS) if arguments.quick else arguments.faults
    per_run, total = min(arguments.per_run, num_faults), ChaosResult()
    with folder_for_runs(arguments.keep) as folder:
        settings = (f"task.held_out={HELD_OUT}", f"updates={3 + UPDATES_PER_FAULT * per_run}")
        quiet = disturb(folder / "quiet", (), arguments.seed, *settings)
        console(f"without faults: {described(quiet)}")
        rng = random.Random(arguments.seed)
        while len(total.faults) < num_faults and total.runs < 2 * math.ceil(num_faults / per_run) + 2:
            count = min(per_run, num_faults - len(total.faults))
            faults = [rng.choice(DOUBLE_FAULTS if rng.random() < DOUBLE_SHARE else FAULTS) for _ in range(count)]
            result = disturb(folder / f"run-{total.runs}", faults, rng.randrange(2**31), *settings)
            total.add(result)
            console("\n  ".join([f"run {total.runs}: {len(result.faults)} faults, {described(result)}", *result.problems]))
    show_faults(total)
    too_low = [final for _, final in total.accuracies for _, alone in quiet.accuracies if final < alone - 3 * noise_of(alone)]
    if too_low:
        total.problems.append(f"final accuracies {too_low} are more than 3 standard errors below that of the run without faults")
    problems = [*quiet.problems, *total.problems]
    finish(arguments, metrics_of(quiet, total, len(problems)), [Goal(metric=name, at_most=0) for name in (*COUNTS, "problems")])
    if problems or any(getattr(total, name) for name in COUNTS) or len(total.faults) < num_faults:
        raise SystemExit(f"{len(total.faults)} of {num_faults} faults, {len(problems)} problems:\n" + "\n".join(problems))


@contextmanager
def folder_for_runs(keep: Path | None) -> Generator[Path]:
    """Where to put the runs."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def noise_of(accuracy: float) -> float:
    """Standard error of the difference of two accuracies near this one."""
    return math.sqrt(2 * accuracy * (1 - accuracy) / HELD_OUT)


def described(result: ChaosResult) -> str:
    """A result in one line."""
    counts = ", ".join(f"{getattr(result, name)} {name.replace('_', ' ')}" for name in COUNTS)
    accuracies = "; ".join(f"accuracy {start:.3f} -> {final:.3f}" for start, final in result.accuracies) or "no end"
    return f"{counts}; {accuracies}"


def show_faults(total: ChaosResult) -> None:
    """One row per kind of fault."""
    kinds: defaultdict[str, list[FaultResult]] = defaultdict(list)
    for fault in total.faults:
        kinds[f"{fault.kind} {fault.target}"].append(fault)
    rows: list[list[object]] = []
    for kind, faults in sorted(kinds.items()):
        seconds = [spread([getattr(fault, name) for fault in faults]) for name in ("detected_s", "recovered_s", "went_on_s")]
        rows.append([kind, len(faults), *seconds, sum(len(fault.others) for fault in faults), sum(bool(fault.problem) for fault in faults)])
    counts = ", ".join(f"{name.replace('_', ' ')} {getattr(total, name)}" for name in COUNTS)
    note = f"seconds after the fault, median / largest; over {total.runs} runs: {counts}"
    show("Faults, and what became of them", ("fault", "count", "noticed s", "back s", "trains s", "others lost", "hangs"), rows, note)


def spread(seconds: list[float | None]) -> str:
    """Median / largest."""
    known = [value for value in seconds if value is not None]
    return f"{statistics.median(known):.1f} / {max(known):.1f}" if known else "-"


def metrics_of(quiet: ChaosResult, total: ChaosResult, num_problems: int) -> dict[str, float]:
    """What was counted; accuracies are means over the runs that reached their end."""
    recovered = [fault.recovered_s for fault in total.faults if fault.recovered_s is not None]
    accuracies = {"accuracy_without_faults": quiet.accuracies, "accuracy": total.accuracies}
    return {
        "faults": len(total.faults),
        "runs": total.runs,
        **{name: getattr(total, name) for name in COUNTS},
        "problems": num_problems,
        **({"recovery_s_median": statistics.median(recovered), "recovery_s_max": max(recovered)} if recovered else {}),
        **{name: statistics.mean(final for _, final in pairs) for name, pairs in accuracies.items() if pairs},
    }


if __name__ == "__main__":
    main()

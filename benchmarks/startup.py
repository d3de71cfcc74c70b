"""From the command to the first optimizer update, by stage, against the start of the engine alone.

    python benchmarks/startup.py [--quick] [--json FILE]

Ours: `async-rlhf train conf/quickstart.yaml`, until its log says that the first update is through: Ray, a learner, a scorer, a generator
whose canary is proven, the evaluation of the start, a batch, an update. The supervised start must be in the cache (the first run makes
it). The engine alone: a process that imports vllm, builds an engine with the same arguments for a policy of the same size, and samples
one token. In turn. Cold: before it, every file of the environment and of the checkout is dropped from the page cache (posix_fadvise);
files that another process has mapped stay, and what lies below this machine's disk is not cold.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bare_vllm import engine_arguments
from harness import CHECKOUT, Goal, Spread, command_line, finish, in_turn, ratios, show
from stand_in import write_policy

from actors.environment import ACTOR_ENVIRONMENT
from async_rlhf.config import load_config

CONFIG = "conf/quickstart.yaml"
STAGES = {
    "Ray is up": r"starting \d+ generator",
    "scorer is ready": r"scorer-0\S* is ready",
    "learner is ready": r"learner-0\S* is ready",
    "generator is ready": r"generator-0\S* is ready",
    "all are ready": r"installing version 0",
    "the start is evaluated": r"start accuracy",
    "first update": r"update 1/",
}
LAST = "first update"
ENGINE = """
import json, sys
from vllm import EngineArgs, LLMEngine, SamplingParams
engine = LLMEngine.from_engine_args(EngineArgs(model=sys.argv[1], **json.loads(sys.argv[2])))
engine.add_request("0", {"prompt_token_ids": [4, 5, 6]}, SamplingParams(max_tokens=1, logprobs=0, detokenize=False))
while engine.has_unfinished_requests():
    engine.step()
print("sampled", flush=True)
"""


def start_engine(folder: Path) -> float:
    """Seconds from the command to the first token."""
    arguments = json.dumps(engine_arguments(load_config([CONFIG], []).config))
    with lines_of([sys.executable, "-c", ENGINE, str(folder), arguments], ACTOR_ENVIRONMENT) as lines:
        return next(passed_s for passed_s, line in lines if line.startswith("sampled"))


def start_run() -> dict[str, float]:
    """Seconds from the command to each stage."""
    seen: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "async_rlhf", "train", CONFIG, f"run.dir={folder}/run", "updates=2"]
        with lines_of(command, {}) as lines:
            for passed_s, line in lines:
                seen |= {stage: passed_s for stage, pattern in STAGES.items() if stage not in seen and re.search(pattern, line)}
                if LAST in seen:
                    break
    assert len(seen) == len(STAGES), f"the run came only to {seen}"
    return {stage: seen[stage] for stage in STAGES}


@contextmanager
def lines_of(command: list[str], environment: Mapping[str, str]) -> Generator[Iterator[tuple[float, str]]]:
    """A command's output, line by line, each with the seconds that had passed; at the exit it is told to end, and waited for."""
    began, whole = time.perf_counter(), {**os.environ, **environment}
    process = subprocess.Popen(command, cwd=CHECKOUT, env=whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        yield ((time.perf_counter() - began, line) for line in process.stdout)
    finally:
        process.terminate()
        process.communicate()


def forget_files() -> None:
    """Drop what this machine has read of the environment and of the checkout."""
    for root in {Path(sys.prefix).resolve(), CHECKOUT}:
        for file in root.rglob("*"):
            if file.is_file() and not file.is_symlink():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def main() -> None:
    """Measure, print the tables, and write the metrics where asked."""
    arguments = command_line(__doc__, "two rounds instead of five, none before them to warm up, and nothing cold").parse_args()
    runs: list[dict[str, float]] = []

    def run() -> float:
        runs.append(start_run())
        return runs[-1][LAST]

    with tempfile.TemporaryDirectory() as folder:
        write_policy(Path(folder))

        def engine() -> float:
            return start_engine(Path(folder))

        if not arguments.quick:  # the first of each may find files that were not read yet
            run()
            engine()
            runs.clear()
        found = in_turn({"run": run, "engine": engine}, 2 if arguments.quick else 5)
        warm = list(runs)
        cold = {} if arguments.quick else {name: [after_forgetting(start)] for name, start in {"run": run, "engine": engine}.items()}
    ratio = ratios(found["run"], found["engine"])
    rows: list[list[object]] = [[stage, Spread.of([each[stage] for each in warm])] for stage in STAGES]
    rows.append(["the engine alone, first token", Spread.of(found["engine"])])
    rows.append(["first update / the engine alone", ratio])
    if cold:
        for row, value in zip(rows, (*runs[-1].values(), *cold["engine"], ratios(cold["run"], cold["engine"]).median), strict=True):
            row.append(value)
    show("Seconds from the command", ("", "warm", *(["cold"] if cold else [])), rows)
    metrics = {"ratio_to_engine_start": ratio.median, "engine_start_s": Spread.of(found["engine"]).median}
    metrics |= {f"{stage.replace(' ', '_')}_s": Spread.of([each[stage] for each in warm]).median for stage in STAGES}
    if cold:
        metrics |= {"ratio_cold": cold["run"][0] / cold["engine"][0], "first_update_cold_s": cold["run"][0]}
    finish(arguments, metrics, [Goal(metric="ratio_to_engine_start", at_most=2.0)])


def after_forgetting(start: Callable[[], float]) -> float:
    """What `start` measures when nothing is in memory."""
    forget_files()
    return start()


if __name__ == "__main__":
    main()

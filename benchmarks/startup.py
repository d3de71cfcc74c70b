"""From the command to the first optimizer update, by stage.

    python benchmarks/startup.py [--quick] [--json FILE]

Runs `train` on the quickstart config several times and reads the stages from its log. The supervised start must be in the cache
(the first run makes it). Prints the median seconds of each stage, counted from the start of the command.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
STAGES = {
    "Ray is up": r"starting \d+ generator",
    "scorer ready": r"scorer-0 is ready",
    "learner ready": r"learner-0 is ready",
    "generator ready": r"generator-0.0 is ready",
    "version 0 verified, start evaluated": r"start accuracy",
    "first update": r"update 1/",
}


def measure() -> dict[str, float]:
    """One run; seconds from the command to each stage."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "async_rlhf", "train", "conf/quickstart.yaml", f"run.dir={folder}/run", "updates=2"]
        started = time.monotonic()
        process = subprocess.Popen(line, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        seen: dict[str, float] = {}
        for text in process.stdout:
            for stage, pattern in STAGES.items():
                if stage not in seen and re.search(pattern, text):
                    seen[stage] = time.monotonic() - started
        assert process.wait() == 0 and len(seen) == len(STAGES), f"the run failed after {seen}"
    return seen


def main() -> None:
    """Measure, print one table, and write the medians where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run instead of three")
    parser.add_argument("--json", type=Path, help="where to write {'metrics': {...}}")
    arguments = parser.parse_args()
    runs = [measure() for _ in range(1 if arguments.quick else 3)]
    print(f"{'stage':<40}{'median s':>10}{'min':>8}{'max':>8}")
    for stage in STAGES:
        times = [run[stage] for run in runs]
        print(f"{stage:<40}{statistics.median(times):>10.1f}{min(times):>8.1f}{max(times):>8.1f}")
    if arguments.json:
        medians = {stage.replace(" ", "_").replace(",", ""): statistics.median(run[stage] for run in runs) for stage in STAGES}
        arguments.json.write_text(json.dumps({"metrics": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""benchmarks/gpu.py where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import CHECKOUT, environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def benchmark(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**environment(), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "benchmarks/gpu.py", *words], cwd=CHECKOUT, env=env, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_that_is_no_failure() -> None:
    done = benchmark()

    assert done.returncode == 0 and "there is no GPU on this machine" in done.stdout


def test_its_code_runs_on_the_cpu(tmp_path: Path) -> None:
    done = benchmark("--tiny", "--peak-tflops", "1", "--json", str(tmp_path / "out.json"))

    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "out.json").read_text())["metrics"]
    assert metrics.keys() == {"learner_tokens_per_s_tiny", "mfu_tiny", "generator_tokens_per_s_tiny"}
    assert all(value > 0 for value in metrics.values()), metrics

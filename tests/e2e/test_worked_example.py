"""The documentation's worked example, done as it says."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import CHECKOUT, environment, rows_of, summary_of
from tests.support.worked_example import apply_page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_the_algorithm_of_the_page_passes_its_tests_and_trains(tmp_path: Path) -> None:
    copy = apply_page(CHECKOUT / "docs" / "adding-an-algorithm.md", tmp_path / "copy")
    env = {**environment(), "PYTHONPATH": str(copy)}
    named = ("rebel_loss", "loss_invariances", "config", "config_contradictions", "metrics", "architecture")
    tests = (*(f"tests/unit/test_{name}.py" for name in named), "-q", "-p", "no:cacheprovider")
    words = ("train", "conf/quickstart.yaml", "algorithm=rebel", "updates=4", f"run.dir={tmp_path / 'run'}")

    checked = subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=copy, env=env, capture_output=True, text=True, timeout=500)
    done = subprocess.run([sys.executable, "-m", "async_rlhf", *words], cwd=copy, env=env, capture_output=True, text=True, timeout=500)

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary_of(tmp_path / "run")["algorithm"] == "rebel"
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 4 and all(row["train/grad_norm"] > 0 and math.isfinite(row["rebel/error"]) for row in rows)

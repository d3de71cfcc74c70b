"""Every kind of algorithm learns asynchronously on the real parts; the long version is benchmarks/learning.py."""

from pathlib import Path

import pytest

from tests.support.command import rows_of, run_cli, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "bok"])
def test_a_short_asynchronous_run_lifts_the_held_out_accuracy(tmp_path: Path, algorithm: str) -> None:
    """DPO's is in test_train.py, with everything else that a run leaves behind."""
    folder = tmp_path / "run"

    done = run_cli("train", "conf/quickstart.yaml", f"algorithm={algorithm}", f"run.dir={folder}", "updates=30")

    assert done.code == 0, done.output
    summary, rows = summary_of(folder), rows_of(folder)
    assert summary["final_accuracy"] > summary["start_accuracy"] + 0.08
    assert summary["staleness_max"] == 1, "the run was not asynchronous"
    assert all(0 < row["mismatch/ess_share"] <= 1 + 1e-6 and row["mismatch/ratio_max"] > 0 for row in rows)
    assert (folder / "model-critic" / "config.json").is_file() == (algorithm == "ppo")
    if algorithm == "ppo":
        assert all(row["value/explained_variance"] <= 1 for row in rows)
        # It starts at 0 and has to find the mean return.
        assert abs(rows[-1]["value/mean"] - rows[-1]["value/return_mean"]) < 0.15 < rows[-1]["value/mean"]

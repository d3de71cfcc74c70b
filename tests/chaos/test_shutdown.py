"""How a run ends when it is told to, and what a reward function can do to it."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_rlhf.audit import audit
from async_rlhf.checkpoints import newest
from async_rlhf.state import read_state
from tests.support.chaos import ChaosRun
from tests.support.command import rows_of, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = ("generator.count=1", "learner.num_ranks=1", "learner.zero_stage=0")
HANGING = """
import time
from pathlib import Path

VICTIM = Path(__file__).with_name("victim")  # the first training prompt that anybody asked about, in whichever process


def score(prompts, completions, **columns):
    if not VICTIM.exists() and prompts[:1] == prompts[1:2]:  # several completions of one prompt: no evaluation
        VICTIM.write_text(prompts[0])
    if VICTIM.exists() and VICTIM.read_text() in prompts:
        time.sleep(1e6)
    return [float(index % 2) for index in range(len(completions))]
"""
RAISING = """
def score(prompts, completions, **columns):
    raise KeyError("no such judge")
"""
FAILURES_BEFORE_THE_END = 20


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[ChaosRun]]:
    """Runs to clean up after, whatever the test makes of them."""
    runs: list[ChaosRun] = []
    yield runs
    for run in runs:
        run.leftovers()


def start(started: list[ChaosRun], folder: Path, *settings: str) -> ChaosRun:
    run = ChaosRun(folder, *SMALL, *settings)
    started.append(run)
    return run


@pytest.mark.parametrize(
    ("signum", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.long),
    ],
)
def test_signal_ends_a_run_with_a_checkpoint_and_nothing_left_and_a_resume_goes_on_to_the_end(
    tmp_path: Path, started: list[ChaosRun], signum: signal.Signals, code: int, word: str
) -> None:
    run = start(started, tmp_path / "run", "updates=30", "checkpoint.every_updates=100")
    run.wait_for_update(7)

    run.driver.send_signal(signum)

    assert run.end(180) == code, run.last_words()
    assert run.leftovers() == []
    checkpoint, skipped = newest(run.folder)
    state, summary = read_state(run.folder), summary_of(run.folder)
    assert checkpoint is not None and skipped == []
    assert checkpoint.version == state.version == len(rows_of(run.folder)) == summary["checkpoint"] >= 7
    assert (summary["exit"], summary["exit_code"], state.phase) == (word, code, "interrupted")
    assert audit(run.folder).problems == ()

    run.resume()
    assert run.end() == 0, run.last_words()
    assert run.leftovers() == []
    found = audit(run.folder)
    assert found.problems == () and found.updates == 30


@pytest.mark.long
def test_second_signal_ends_a_run_at_once_and_a_resume_goes_on(tmp_path: Path, started: list[ChaosRun]) -> None:
    run = start(started, tmp_path / "run", "updates=20")
    run.wait_for_update(6)

    run.driver.send_signal(signal.SIGINT)
    run.driver.send_signal(signal.SIGTERM)

    assert run.end(30) in (130, 143), run.last_words()
    assert run.leftovers() == []
    run.resume()
    assert run.end() == 0, run.last_words()
    assert audit(run.folder).problems == ()


def test_reward_that_never_returns_costs_its_prompt_and_not_the_run(tmp_path: Path, started: list[ChaosRun]) -> None:
    reward = tmp_path / "hanging.py"
    reward.write_text(HANGING)

    run = start(
        *(started, tmp_path / "run", f"reward.function={reward}:score", "updates=60"),
        *("timeouts.score_s=15", "queue.max_attempts=1"),
    )

    assert run.end(500) == 0, run.last_words()
    summary, found = summary_of(run.folder), audit(run.folder)
    assert found.problems == ()
    assert found.voided["failed"] == summary["dropped"]["failed"] == 1
    (reason,) = summary["failed_prompts"].values()
    assert "no score within 15 s" in reason
    assert run.leftovers() == []


@pytest.mark.long
def test_reward_that_always_raises_ends_the_run_as_bad_input_and_says_why(tmp_path: Path, started: list[ChaosRun]) -> None:
    reward = tmp_path / "raising.py"
    reward.write_text(RAISING)

    run = start(started, tmp_path / "run", f"reward.function={reward}:score", "queue.max_attempts=1")

    assert run.end() == 2, run.last_words()
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["exit"] == "failed" and summary["updates"] == 0
    assert "KeyError: 'no such judge'" in summary["error"] and f"{FAILURES_BEFORE_THE_END} of " in summary["error"]
    assert "no such judge" in run.last_words()
    assert summary["dropped"]["failed"] == len(summary["failed_prompts"]) >= FAILURES_BEFORE_THE_END - 1, "no update booked them"
    assert run.leftovers() == []

"""What a person reads while a run goes on."""

import io

import pytest
from rich.console import Console

from async_rlhf.progress import Progress, describe, eta_s
from async_rlhf.state import TrainingState

ROW = {
    "version": 20,
    "time_s": 50.0,
    "reward/mean": 0.4375,
    "rollout/kl_k1_nats": 0.0625,
    "queue/staleness_mean": 0.75,
    "queue/staleness_max": 1.0,
    "queue/depth_groups": 6,
    "generate/tokens_per_s": 1234.4,
    "generate/idle_share": 0.125,
    "train/tokens_per_s": 5678.0,
    "train/idle_share": 0.5,
}
STATE = TrainingState(
    run_id="r", phase="training", version=20, num_updates=80, optimizer_steps=20, prompts=1, completions=2, tokens=3, seed=0
)
LINE = "update 20/80 reward 0.438 kl 0.062 staleness 0.75/1 queue 6 generator 1234 tok/s idle 12% learner 5678 tok/s idle 50% eta 2:30"


def written(terminal: bool, *, stage: str | None = None, version: int = 20, verdict: str = "") -> str:
    """What a console gets from one update, or from one stage."""
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=terminal, width=100, color_system=None), num_updates=80) as progress:
        if stage is None:
            progress.update(ROW | {"version": version}, STATE, verdict)
        else:
            progress.stage(stage)
    return out.getvalue()


def test_an_update_is_one_line():
    assert describe(ROW, 80) == LINE


def test_a_log_gets_one_line_per_update_however_long_it_is():
    text = written(terminal=False)

    assert text.endswith(f" s] {LINE}\n") and text.count("\n") == 1


def test_a_terminal_gets_a_panel_with_the_same_numbers():
    text = written(terminal=True)

    for piece in (
        "20 / 80",
        "2:30",
        "0.438",
        "0.062 nats",
        "0.75 mean, 1 max",
        "6 groups",
        "1,234 tokens/s",
        "12%",
        "5,678 tokens/s",
        "50%",
    ):
        assert piece in text, piece


def test_a_terminal_gets_the_verdict_with_every_update():
    assert "generation-bound" in written(terminal=True, version=19, verdict="generation-bound")


def test_a_log_gets_the_verdict_with_every_twentieth_update():
    assert written(terminal=False, verdict="balanced").endswith(" s] verdict: balanced\n")
    assert "verdict" not in written(terminal=False, version=21, verdict="balanced")


@pytest.mark.parametrize("text", ["[bold]not bold[/bold]", "a [/] that closes nothing", "[link=http://x]click[/link]", "runs/[1]"])
@pytest.mark.parametrize("terminal", [True, False])
def test_markup_in_a_stage_is_text_like_any_other(terminal: bool, text: str):
    assert written(terminal, stage=text).endswith(f"s] {text}\n")


@pytest.mark.parametrize(("version", "time_s", "left"), [(1, 2.0, 158.0), (20, 50.0, 150.0), (80, 200.0, 0.0)])
def test_eta_goes_on_at_the_mean_speed_so_far(version: int, time_s: float, left: float):
    """(80 - version) * time_s / version."""
    assert eta_s({"version": version, "time_s": time_s}, 80) == pytest.approx(left, abs=1e-9)


@pytest.mark.parametrize(("time_s", "text"), [(0.0, "0:00"), (59.6, "1:00"), (61.0, "1:01"), (3725.0, "62:05")])
def test_durations_are_minutes_and_seconds(time_s: float, text: str):
    """At half of 80 updates as much time is left as has passed."""
    assert describe(ROW | {"version": 40, "time_s": time_s}, 80).endswith(f"eta {text}")


def test_no_escape_codes_reach_a_log():
    assert "\x1b" not in written(terminal=False)

"""benchmarks/harness.py: ratios, goals and what is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.harness import Goal, Spread, command_line, finish, growth, in_turn, machine, ratios, show


def test_measures_take_turns_and_every_other_round_goes_backwards() -> None:
    order: list[str] = []

    def measure(name: str) -> Callable[[], float]:
        return lambda: float(len(order)) if order.append(name) is None else 0.0

    assert in_turn({"a": measure("a"), "b": measure("b")}, 3) == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_a_ratio_is_taken_round_by_round() -> None:
    # A round in which the machine was twice as slow for both leaves the ratio alone.
    assert ratios([1.0, 2.0, 3.0], [2.0, 4.0, 2.0]) == Spread(0.5, 0.5, 1.5)
    with pytest.raises(ValueError, match="longer"):
        ratios([1.0], [1.0, 2.0])


def test_growth_is_the_exponent() -> None:
    assert growth([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2.0)
    assert growth([1, 2, 4], [5, 5, 5]) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("goal", "metrics", "reached"),
    [
        (Goal(metric="speedup", at_least=1.5), {"speedup": 1.5}, True),
        (Goal(metric="speedup", at_least=1.5), {"speedup": 1.49}, False),
        (Goal(metric="pause", at_most=1.1), {"pause": 1.2}, False),
        (Goal(metric="pause", at_most=1.1), {}, False),
        (Goal(metric="pause", at_most=1.1), {"pause": float("nan")}, False),
    ],
    ids=["on the line", "below", "above", "not measured", "not a number"],
)
def test_goals(goal: Goal, metrics: dict[str, float], reached: bool) -> None:
    assert goal.reached(metrics) is reached


def test_no_figure_of_a_wide_table_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [f"{number}.25 (0.{number}-9.{number})" for number in range(10, 30)]

    show("wide", [f"column {number}" for number in range(20)], [figures])

    printed = capsys.readouterr().out
    assert all(figure in printed for figure in figures) and "\u2026" not in printed


def test_numbers_goals_and_machine_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command_line("What it does.", "less").parse_args(["--quick", "--json", str(tmp_path / "new" / "out.json")])
    show("a title", ("name", "value"), [("x [b]", 1.23456)])
    finish(arguments, {"ratio": 0.9}, [Goal(metric="ratio", at_least=0.95), Goal(metric="other", at_most=3)])
    printed = capsys.readouterr().out
    assert "x [b]" in printed and "1.23" in printed
    assert "MISSED   ratio >= 0.95: 0.9" in printed and "open     other <= 3: not measured" in printed
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["metrics"] == {"ratio": 0.9} and written["goals"] == {"ratio >= 0.95": False, "other <= 3": False}
    assert written["machine"] == machine() and written["quick"] is True and "torch" in machine()

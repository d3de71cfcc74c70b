"""The evaluations in the report: table, curves with intervals, score against KL, and completions for people."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from async_rlhf.evaluation import Evaluation, Findings, Sample
from async_rlhf.evaluation_log import EvaluationLog, write_samples
from async_rlhf.report_evaluations import MAX_ROWS, render_evaluations
from async_rlhf.report_samples import render_samples
from async_rlhf.report_text import FOLDED_TEXT, MAX_TEXT, folded
from tests.unit.test_report import HOSTILE, _Page, evaluation, page_of, run_folder


def row(version: int, *, newest: int | None = None, stage: str = "between", **numbers: float) -> dict[str, Any]:
    """A row whose score rises with its version, and whose KL does."""
    score, nats = 0.2 + version / 100, version / 10
    named = {"score": score, "sampled_score": score - 0.1, "length_tokens": 4.0, "cut_share": 0.0, "kl_nats": nats, "winrate": 0.5}
    named |= {f"{name}_{end}": named[name] + sign * 0.05 for name in ("score", "sampled_score", "winrate", "kl_nats") for end, sign in ENDS}
    named |= {"kl_error_nats": 0.05 / 1.96} | numbers
    base: dict[str, Any] = {"stage": stage, "version": version, "version_min": version, "version_max": newest or version, "prompts": 9}
    return base | {"opponent": "references", "problem": ""} | {f"evaluate/{name}": value for name, value in named.items()}


ENDS = (("low", -1), ("high", 1))
ROWS = [row(0, stage="start"), row(4, newest=6), row(8, stage="final")]


def group(html: str, name: str) -> str:
    """What the SVG draws under this id."""
    found = re.search(rf'<g id="[^"]*{re.escape(name)}">(.*?)</g>', html, re.DOTALL)
    assert found is not None, name
    return found[1]


def points_of(path: str) -> list[tuple[float, float]]:
    """Coordinates of a path, y upwards."""
    return [(float(x), -float(y)) for x, y in re.findall(r"[ML] ?(-?[\d.]+) (-?[\d.]+)", path)]


def test_table_names_the_versions_of_each_evaluation_and_its_intervals() -> None:
    page = _Page(render_evaluations(ROWS))

    assert [cells[0] for cells in page.rows] == ["versions", "0", "4 to 6", "8"]
    assert page.rows[0][1:] == ["score, greedy", "win-rate", "score, sampled", "KL, nats", "tokens", "cut"]
    assert page.row("4 to 6")[1:5] == ["0.240 / 0.190 to 0.290", "0.500 / 0.450 to 0.550", "0.140 / 0.090 to 0.190", "0.400 / \u00b1 0.026"]
    assert page.open == []


def test_table_of_many_evaluations_keeps_the_first_and_the_last() -> None:
    page = _Page(render_evaluations([row(version) for version in range(500)]))

    versions = [int(cells[0]) for cells in page.rows[1:]]
    assert len(versions) == MAX_ROWS and versions[0] == 0 and versions[-1] == 499 and versions == sorted(versions)


def test_curves_of_evaluations_are_shaded_between_the_ends_of_their_intervals() -> None:
    html = render_evaluations(ROWS)

    line = points_of(group(html, "evaluated-score:evaluate/score"))[:3]
    shade = group(html, "evaluated-score:evaluate/score:interval")
    (offset,) = (float(y) for y in re.findall(r'<use[^>]* y="([\d.]+)"', shade))
    band = [(x, y - offset) for x, y in points_of(shade)]
    assert [x for x, _ in line] == sorted({x for x, _ in line})
    for x, y in line:
        inside = [other for at, other in band if at == pytest.approx(x, abs=0.01)]
        assert min(inside) < y < max(inside)
        assert y - min(inside) == pytest.approx(max(inside) - y, abs=0.05)
    assert 'id="evaluated-winrate-evaluated-winrate:level"' in html, "even is marked"


def test_frontier_draws_score_over_divergence_in_the_order_of_the_versions() -> None:
    """Score and KL both rise evenly with the version: three points on a rising line, the middle one in the middle."""
    html = render_evaluations(ROWS)

    first, middle, last = points_of(group(html, "frontier-score:points"))[:3]
    assert first[0] < middle[0] < last[0] and first[1] < middle[1] < last[1]
    assert middle == pytest.approx(((first[0] + last[0]) / 2, (first[1] + last[1]) / 2), abs=0.05)
    assert "KL to the reference, nats per completion</text>" in html and "score, sampled</text>" in html
    names = re.findall(r">(start|v\d+)</text>", html)
    assert names == ["start", "v4", "v8"]


def test_frontier_is_left_out_where_nothing_was_sampled_and_the_reward_has_its_own_where_it_is_measured() -> None:
    greedy = [{key: value for key, value in each.items() if "sampled" not in key and "kl_" not in key} for each in ROWS]
    assert "frontier" not in render_evaluations(greedy) and "curve-evaluated-kl" not in render_evaluations(greedy)

    rewarded = [row(at, sampled_reward=1.0, sampled_reward_low=0.9, sampled_reward_high=1.1) for at in (0, 4, 8)]
    assert {"frontier-score", "frontier-reward"} <= set(re.findall(r'id="curve-([\w-]+)"', render_evaluations(rewarded)))


def test_win_rate_that_failed_says_why() -> None:
    failed = {key: value for key, value in row(4).items() if "winrate" not in key} | {"problem": "the judge failed: <gone>"}

    html = render_evaluations([row(0), failed])

    assert '<span class="bad" title="the judge failed: &lt;gone&gt;">failed</span>' in html


def test_run_without_evaluations_says_so_and_an_evaluation_alone_is_drawn(tmp_path: Path) -> None:
    assert "No evaluations were recorded" in page_of(run_folder(tmp_path / "old"))
    assert "frontier" not in render_evaluations(ROWS[:1]) and "<svg" in render_evaluations(ROWS[:1])


def test_page_shows_the_evaluations_of_its_folder_and_the_latest_completions(tmp_path: Path) -> None:
    folder, log = run_folder(tmp_path), EvaluationLog(tmp_path)
    for version, newest, score in ((0, 0, 0.0), (2, 3, 1.0)):
        found = Evaluation(
            version=newest,
            oldest_version=version,
            temperature=0.0,
            samples=(Sample(prompt="1+1=", completion="?", expected="2", score=score),),
        )
        log.write(Findings(stage="between" if version else "start", version=version, greedy=found))

    text = page_of(folder)

    assert "<th>before (version 0)</th><th>after (versions 2 to 3)</th>" in text
    assert _Page(text).row("2 to 3")[1].startswith("1.000") and _Page(text).row("fixed")[1] == "1+1="


def test_hostile_completions_and_opponents_stay_text(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    hostile = json.dumps(row(0) | {"opponent": HOSTILE, "problem": HOSTILE})
    (folder / "evaluations.jsonl").write_text(f"{hostile}\n")
    for name in ("start", "final"):
        write_samples(folder, name, evaluation(0, [(HOSTILE * 30, HOSTILE * 30, 0.5)]))

    text = page_of(folder)

    page = _Page(text)
    assert page.open == [] and "script" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not set(text) & {"\x00", "\x1b", "\u202e"}


def test_long_texts_are_folded_behind_their_beginning_and_lose_nothing_but_the_middle() -> None:
    assert folded("a" * FOLDED_TEXT) == "a" * FOLDED_TEXT
    text = "<" * FOLDED_TEXT + "b" * 100

    page = folded(text)

    head = "&lt;" * FOLDED_TEXT
    assert page == f'<details class="fold"><summary>{head}</summary>{"b" * 100}</details>'
    assert f"[{5000:,} characters left out]" in folded("c" * (MAX_TEXT + 5000))


def test_graded_completions_show_score_and_reward() -> None:
    def graded(score: float, reward: float | None) -> Evaluation:
        return Evaluation(
            version=0, temperature=0.0, samples=(Sample(prompt="p", completion="c", expected="e", score=score, reward=reward),)
        )

    html = render_samples((graded(0.25, 3.0), graded(0.125, None)))

    assert '<span class="score">0.25, reward 3</span> c' in html and '<span class="score">0.125</span> c' in html
    assert '<span class="bad">worse</span>' in html

"""The HTML report: what it shows, what it never lets through, and that half a run is enough for it."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from async_rlhf.errors import ConfigError
from async_rlhf.evaluation import Evaluation, Sample
from async_rlhf.evaluation_log import write_samples
from async_rlhf.recorder import keep_config, write_summary
from async_rlhf.report import write_report
from async_rlhf.report_curves import CURVES, MAX_POINTS, running_mean, thin
from async_rlhf.report_samples import MAX_SAMPLES
from async_rlhf.report_text import MAX_TEXT, visible
from async_rlhf.state import TrainingState

CONFIG = "updates: 9\nmax_staleness: 2\nalgorithm:\n  minibatches_per_batch: 1\n  name: rloo\n  dpo:\n    beta: 0.1\nenv: {}\n"
HOSTILE = "<script>alert('x')</script>\"&\x00\x1b[31m\u202e\ud800"
MAX_PAGE_BYTES = 1_500_000


def row(version: int) -> dict[str, float]:
    return {
        "version": version,
        "time_s": 1.5 * version,
        **{line.key: (version * 7 % 11) / 11 for curve in CURVES for line in curve.lines},
    }


def summary(**changed: Any) -> dict[str, object]:
    base: dict[str, object] = {
        "run_id": "demo",
        "algorithm": "rloo",
        "exit": "success",
        "error": "",
        "start_accuracy": 0.25,
        "final_accuracy": 0.75,
        "wall_s": 91.25,
        "train_wall_s": 60.5,
        "generator_idle_share": 0.125,
        "learner_idle_share": 0.5,
        "dropped": {"tied": 1384, "refused_duplicate": 2, "failed: a": 3, "failed: b": 4, "last_batch": 0},
        "skipped_rows": {"prompt_too_long": 1021, "prompt_empty": 2},
    }
    return base | changed


def evaluation(version: int, samples: list[tuple[str, str, float]]) -> Evaluation:
    made = tuple(Sample(prompt=prompt, completion=text, expected=f"expected {prompt}", score=score) for prompt, text, score in samples)
    return Evaluation(version=version, temperature=0.0, samples=made)


def run_folder(path: Path, *, updates: int = 3, config: str = CONFIG, **state: Any) -> Path:
    """A run that is still going: no summary, no samples."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(config)
    fields: dict[str, Any] = {"run_id": "demo", "phase": "training", "version": updates, "num_updates": 9, "optimizer_steps": 2 * updates}
    fields |= {"prompts": 1234567, "completions": 7, "tokens": 8, "seed": 0, "staleness_max": 2, "updated_at": 86400.0}
    (path / "state.json").write_text(json.dumps(asdict(TrainingState(**(fields | state)))))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row(version)) + "\n" for version in range(1, updates + 1)))
    return path


def test_the_page_holds_the_verdict_where_enough_is_known(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    few = page_of(folder)
    rows = [
        {"version": version, "time_s": version, "queue/wait_s": 0.5, "train/step_s": 0.5, "generate/idle_share": 0.05}
        for version in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert "too little is known yet" in few
    assert "<b>Verdict</b> learner idle 50 %: generation-bound; 1 -&gt; 2 generators would give about 1.9x" in page_of(folder)


def finished(path: Path, *, updates: int = 3) -> Path:
    folder = run_folder(path, updates=updates, phase="finished")
    write_summary(folder, summary())
    before = [("1+1=", "3", 0.0), ("1+2=", "3", 1.0), ("1+3=", "", 0.0), ("1+4=", "5", 1.0)]
    after = [("1+1=", "2", 1.0), ("1+2=", "9", 0.0), ("1+3=", "4", 1.0), ("1+4=", "5", 1.0)]
    write_both(folder, evaluation(0, before), evaluation(updates, after))
    return folder


def write_both(folder: Path, start: Evaluation, final: Evaluation) -> None:
    write_samples(folder, "start", start)
    write_samples(folder, "final", final)


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


class _Page(HTMLParser):
    """Collects what the tests ask of a page: its elements, what it refers to, and its table rows as text."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br":
            self.rows[-1][-1] += " / "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "tr" in self.open and self.rows[-1]:
            self.rows[-1][-1] += data.replace("\u00a0", " ")

    def row(self, label: str) -> list[str]:
        (found,) = [cells for cells in self.rows if cells[0].startswith(label)]
        return found


# What it shows


def test_full_report_is_written_whole_returns_its_path_and_leaves_no_other_file(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    (folder / "report.html").write_text("old")
    before = {file.name for file in folder.iterdir()}

    path = write_report(folder)

    text = path.read_text(encoding="utf-8")
    assert path == folder / "report.html"
    assert text.startswith("<!DOCTYPE html>") and text.endswith("</html>\n")
    assert _Page(text).open == []
    assert {file.name for file in folder.iterdir()} == before


def test_old_report_survives_when_the_new_one_cannot_be_made(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    (folder / "report.html").write_text("old")
    (folder / "summary.json").write_text("{")

    with pytest.raises(json.JSONDecodeError):
        write_report(folder)

    assert (folder / "report.html").read_text() == "old"


def test_tables_on_top_say_what_the_run_did(tmp_path: Path) -> None:
    page = _Page(page_of(finished(tmp_path)))

    assert page.row("Held-out accuracy") == ["Held-out accuracy", "50.0%", "75.0%", "+25.0 points"]
    assert page.row("Right answers")[1:] == ["2 of 4 / 15.0 to 85.0%", "3 of 4 / 30.1 to 95.4%", "2 fixed / 1 newly broken"]
    assert page.row("Batch reward")[1:] == ["0.636", "0.909", "+0.273"]
    shown = {cells[0]: cells[1] for cells in page.rows if len(cells) == 2}
    assert shown == {
        "Updates": "3 of 9",
        "Optimizer steps": "6",
        "Prompts trained": "1,234,567",
        "Completions trained": "7",
        "Completion tokens trained": "8",
        "Wall time, s": "91.2",
        "Training time, s": "60.5",
        "Largest staleness trained": "2 (bound 2)",
        "Generators idle": "12.5%",
        "Learner idle": "50.0%",
        "Dropped groups": "7 failed / 2 refused duplicate / 1,384 tied",
        "Skipped rows": "2 prompt empty / 1,021 prompt too long",
    }


@pytest.mark.parametrize(("staleness", "colour"), [(2, "good"), (3, "bad")])
def test_staleness_above_the_bound_is_marked(tmp_path: Path, staleness: int, colour: str) -> None:
    page = page_of(run_folder(tmp_path, staleness_max=staleness))

    assert f'<span class="{colour}">{staleness} (bound 2)</span>' in page


def test_each_declared_curve_appears_with_all_its_lines_a_label_and_a_caption(tmp_path: Path) -> None:
    text = page_of(finished(tmp_path))
    ids = [attributes["id"] for _, attributes in _Page(text).elements if "id" in attributes]

    for curve in CURVES:
        figure = text[text.index(f'<figure id="curve-{curve.name}">') :]
        figure = figure[: figure.index("</figure>")]
        assert 'role="img"' in figure and "aria-label=" in figure and "<title>" in figure
        assert f">{curve.y_label}</text>" in figure
        assert figure.endswith(f"<figcaption>{visible(curve.caption)}</figcaption>")
        assert {f"{curve.name}-{curve.name}:{line.key}" for line in curve.lines} <= set(ids)
    assert "staleness-staleness:bound" in ids
    assert len(ids) == len(set(ids))


def test_each_part_of_the_reward_has_a_curve_and_a_foreign_name_has_none(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    parts = {"reward/part/help-ful": 0.25, "reward/part/model.cut": 0.0, "reward/part/other.cut": 0.5, "reward/part/<script>": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row(1) | parts) + "\n")

    text = page_of(folder)

    assert '<figure id="curve-part-help-ful"><h3>Reward part help-ful</h3>' in text and "batch mean, last 0.25" in text
    assert "Reward part other.cut" in text and "last 50%" in text
    assert "model.cut" not in text and "<script>" not in text and "&lt;script" not in text


def test_metric_that_an_algorithm_never_reports_is_named_as_not_measured(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / "metrics.jsonl").write_text(json.dumps({"version": 1, "time_s": 1.0, "reward/mean": 0.5}) + "\n")

    text = page_of(folder)

    assert text.count("not measured in this run") == sum(not curve.only_where_measured for curve in CURVES) - 1
    assert not any(f"curve-{curve.name}" in text for curve in CURVES if curve.only_where_measured)


def test_values_that_are_not_finite_leave_gaps_and_are_counted(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, updates=4)
    rows = [row(1), row(2) | {"train/loss": float("nan")}, row(3) | {"train/grad_norm": float("inf")}, row(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))

    text = page_of(folder)

    assert "2 values were not finite numbers and leave gaps" in text


def test_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    folder = finished(tmp_path)

    assert page_of(folder) == page_of(folder)


# How a run ended


def test_interrupted_run_says_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, phase="interrupted")
    write_summary(folder, summary(exit="interrupted", error="ended by SIGINT", start_accuracy=None, final_accuracy=None))

    text = page_of(folder)

    assert '<span class="badge warn">interrupted</span>' in text
    assert "ended by SIGINT" in text
    assert "Held-out accuracy is not known" in text
    assert "No completions to show yet" in text


@pytest.mark.parametrize(("status", "colour"), [("success", "good"), ("failed", "bad"), ("terminated", "warn")])
def test_badge_has_the_colour_of_the_exit_status(tmp_path: Path, status: str, colour: str) -> None:
    folder = run_folder(tmp_path)
    write_summary(folder, summary(exit=status))

    assert f'<span class="badge {colour}">{status}</span>' in page_of(folder)


def test_run_without_a_summary_shows_its_state_and_the_seconds_so_far(tmp_path: Path) -> None:
    text = page_of(run_folder(tmp_path))

    assert "still running / no summary" in text
    assert "Last state: training" in text
    assert "update 3 of 9" in text
    assert "1970-01-02 00:00 UTC" in text
    assert _Page(text).row("Training time")[1] == "4.5"
    assert _Page(text).row("Wall time")[1] == "not known"


@pytest.mark.parametrize("metrics", ["", None])
def test_run_without_updates_has_no_plots(tmp_path: Path, metrics: str | None) -> None:
    folder = run_folder(tmp_path, updates=0)
    if metrics is None:
        (folder / "metrics.jsonl").unlink()

    text = page_of(folder)

    assert "no updates yet" in text
    assert "<svg" not in text


@pytest.mark.parametrize("updates", [1, 2])
def test_one_or_two_updates_are_drawn_as_dots(tmp_path: Path, updates: int) -> None:
    text = page_of(run_folder(tmp_path, updates=updates))

    svg = text[text.index('<g id="depth-depth:queue/depth_groups">') :]
    assert svg[: svg.index("</g>\n   <g")].count("<use ") == updates


def test_damaged_last_line_of_the_metrics_is_left_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    whole = page_of(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"version": 4, "rew')

    assert page_of(folder) == whole


@pytest.mark.parametrize("damaged", ["5", '{"vers', "[1]", "null"])
def test_a_damaged_line_between_the_metrics_keeps_no_run_from_its_report(tmp_path: Path, damaged: str) -> None:
    folder = run_folder(tmp_path)
    whole = page_of(folder)
    file = folder / "metrics.jsonl"
    file.write_text(f"{damaged}\n" + file.read_text())

    assert page_of(folder) == whole


@pytest.mark.parametrize("missing", ["state.json", "config.yaml"])
def test_folder_that_is_no_run_is_refused_with_a_remedy(tmp_path: Path, missing: str) -> None:
    folder = run_folder(tmp_path)
    (folder / missing).unlink()

    with pytest.raises(ConfigError, match=rf"is no run folder: it has no {missing}; give the folder that `train` printed"):
        write_report(folder)

    assert not (folder / "report.html").exists()


# Sample problems


def test_changed_problems_come_first_and_many_fixed_ones_leave_room_for_broken_ones(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    outcomes = [(0.0, 1.0)] * 100 + [(1.0, 1.0)] * 20 + [(1.0, 0.0)] * 3 + [(0.0, 0.0)] * 20
    asked = [(f"problem {index}", outcome) for index, outcome in enumerate(outcomes)]
    start = evaluation(0, [(prompt, "before", scores[0]) for prompt, scores in asked])
    # Another order after: two generators share the problems.
    final = evaluation(3, [(prompt, "after", scores[1]) for prompt, scores in reversed(asked)])
    write_both(folder, start, final)

    page = _Page(page_of(folder))

    rows = [cells for cells in page.rows if len(cells) == 5][1:]
    assert [cells[0] for cells in rows] == ["fixed"] * (MAX_SAMPLES - 3) + ["broken"] * 3
    assert rows[0] == ["fixed", "problem 0", "expected problem 0", "\u2717 before", "\u2713 after"]
    assert rows[-1] == ["broken", "problem 122", "expected problem 122", "\u2713 before", "\u2717 after"]


def test_a_run_that_evaluated_only_its_start_shows_no_problems_yet(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    without = [cells for cells in _Page(page_of(folder)).rows if len(cells) == 5]

    write_samples(folder, "start", evaluation(0, [("1+1=", "3", 0.0)]))

    assert [cells for cells in _Page(page_of(folder)).rows if len(cells) == 5] == without


def test_unchanged_problems_follow_wrong_ones_first_and_an_empty_answer_is_named(tmp_path: Path) -> None:
    page = _Page(page_of(finished(tmp_path)))

    rows = [cells for cells in page.rows if len(cells) == 5][1:]
    assert [(cells[0], cells[1]) for cells in rows] == [("fixed", "1+1="), ("fixed", "1+3="), ("broken", "1+2="), ("still right", "1+4=")]
    assert rows[1][3] == "\u2717 (empty)"


def test_scores_that_are_not_zero_or_one_are_shown_as_scores_with_a_bootstrap_interval(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    write_both(folder, evaluation(0, [("a", "x", 0.25), ("b", "x", 0.25)]), evaluation(3, [("a", "y", 0.5), ("b", "y", 0.25)]))

    page = _Page(page_of(folder))

    assert page.row("Held-out score") == ["Held-out score", "0.250", "0.375", "+0.125"]
    assert page.row("Prompts / 95 % interval")[1:] == ["2 prompts / 0.250 to 0.250", "2 prompts / 0.250 to 0.500", "1 better / 0 worse"]
    assert page.row("better")[3:] == ["0.25 x", "0.5 y"] and page.row("equal")[3:] == ["0.25 x", "0.25 y"]


# What it never lets through


def test_hostile_text_stays_text_wherever_it_comes_from(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, config=CONFIG + f"# {HOSTILE[:30]}\n", run_id=HOSTILE, phase=HOSTILE)
    running = page_of(folder)
    write_summary(folder, summary(exit=HOSTILE, error=HOSTILE, dropped={HOSTILE: 1}))
    write_both(folder, evaluation(0, [(HOSTILE, HOSTILE, 0.0)]), evaluation(3, [(HOSTILE, HOSTILE, 1.0)]))
    ended = page_of(folder)

    for text in (running, ended):
        page = _Page(text)
        assert "script" not in {tag for tag, _ in page.elements}
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert page.open == []
        assert not set(text) & {"\x00", "\x1b", "\u202e"}
        assert "&lt;script&gt;" in text


def test_control_and_reordering_characters_become_visible():
    assert visible("a\x00\x1b\r\x7f\u202e\ud800b") == "a\u2400\u241b\u240d[U+007F][U+202E][U+D800]b"
    assert visible("line\n\tnext \u00e9") == "line\n\tnext \u00e9"


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    text = page_of(finished(tmp_path))

    page = _Page(text)
    targets = [
        value or "" for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href", "xlink:href")
    ]
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert targets and {target.removeprefix("#") for target in targets} <= ids
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "://" not in text and "@import" not in text
    assert {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object"} == set()


def test_variable_named_like_a_secret_loses_its_value(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, config=CONFIG.replace("env: {}", "env:\n  HF_TOKEN: hf_abc\n  NCCL_DEBUG: INFO"))

    text = page_of(folder)

    assert "HF_TOKEN: (hidden)" in text and "hf_abc" not in text
    assert "NCCL_DEBUG: INFO" in text


def test_configs_that_a_resume_changed_stay_to_be_read_without_their_secrets(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, config="updates: 4\nenv:\n  HF_TOKEN: hf_old\n")
    for session in (2, 10):
        keep_config(folder, session)
        (folder / "config.yaml").write_text(f"updates: {session}0\n")

    text = page_of(folder)

    titles = re.findall(r"<summary>(The [^<]*)</summary>", text)
    assert titles == [
        "The resolved config (config.yaml)",
        "The config until session 2 changed it",
        "The config until session 10 changed it",
    ]
    assert text.index("updates: 100") < text.index("updates: 4\n") < text.index("updates: 20\n")
    assert "hf_old" not in text and "HF_TOKEN: (hidden)" in text


# Sizes


def test_long_text_loses_its_middle_only(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    long = "H" * MAX_TEXT + "M" * 5000 + "T" * MAX_TEXT
    write_both(folder, evaluation(0, [(long, "x", 0.0)]), evaluation(3, [(long, "x", 0.0)]))

    prompt = _Page(page_of(folder)).row("still wrong")[1]

    left_out = 5000 + MAX_TEXT
    assert prompt == "H" * 600 + f" [{left_out:,} characters left out] " + "T" * 200


def test_page_of_two_thousand_updates_and_hostile_samples_stays_small(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, updates=2000)
    write_summary(folder, summary())
    flood = [(f"{index} " + "\x01<&\u202e" * 5000, "\u202e" * 20000, index % 2.0) for index in range(500)]
    write_both(folder, evaluation(0, flood), evaluation(2000, flood[1:] + flood[:1]))

    assert write_report(folder).stat().st_size < MAX_PAGE_BYTES


def test_thinning_keeps_the_last_value_and_where_asked_the_peaks():
    values = np.zeros(2 * MAX_POINTS + 1)
    values[10], values[-1] = 5.0, 3.0

    picked, peaks = thin(values, peaks=False), thin(values, peaks=True)

    assert len(picked) == len(peaks) <= MAX_POINTS
    assert (picked[-1], peaks[-1]) == (3.0, 3.0)
    assert peaks.max() == 5.0


def test_short_series_is_not_thinned():
    values = np.arange(MAX_POINTS, dtype=np.float64)

    assert thin(values, peaks=True).tolist() == thin(values, peaks=False).tolist() == values.tolist()


def test_running_mean_looks_back_only_and_skips_what_is_not_finite():
    """Window 2: 1; (1 + 3)/2 = 2; 3 alone; 5 alone; (5 + 7)/2 = 6."""
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])

    assert running_mean(values, 2).tolist() == [1.0, 2.0, 3.0, 5.0, 6.0]


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, async_rlhf.report; print('matplotlib' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)

    assert done.stdout.strip() == "False"

"""From a run folder to the JSON of the page."""

import json
import os
from pathlib import Path

import pytest

from async_rlhf.dashboard import views
from async_rlhf.dashboard.catalogue import Catalogue, name_of
from async_rlhf.dashboard.comparison import compare
from async_rlhf.dashboard.folder import RunFolder, is_run
from async_rlhf.journal import Journal
from async_rlhf.report_text import MAX_TEXT
from async_rlhf.rollout_table import encode
from tests.support.dashboard_runs import HOSTILE, LONG, WrittenRun, reward_at, row_of
from tests.support.samples import make_scored, make_ticket


def read(run: WrittenRun) -> RunFolder:
    folder = RunFolder(run.folder)
    folder.refresh()
    return folder


def overview(run: WrittenRun) -> dict[str, object]:
    view = views.overview(read(run))
    json.dumps(view, allow_nan=False)
    return view


def test_a_run_that_goes_on_tells_where_it_stands_and_how_long_it_will_take(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first", num_updates=100)
    run.update(40)

    view = overview(run)

    assert (view["phase"], view["live"], view["version"], view["num_updates"]) == ("training", True, 40, 100)
    assert view["elapsed_s"] == 20.0
    assert view["eta_s"] == pytest.approx(30.0)
    assert view["drops"] == {"tied": 200}


def test_rates_are_means_over_the_last_seconds(tmp_path: Path) -> None:
    """Rows are half a second apart: 20 s hold 40 updates of 64 groups. 140 groups/s are sampled, and as many are out as before."""
    run = WrittenRun(tmp_path / "first", "batch_groups=64", "max_staleness=1")
    run.update(90)

    flow = views.overview(read(run))["flow"]

    assert isinstance(flow, dict)
    assert (flow["updates"], flow["window_s"], flow["updates_per_s"], flow["batch_groups_per_s"]) == (40, 20.0, 2.0, 128.0)
    assert flow["tickets_per_s"] == pytest.approx(140.0)
    assert flow["queue"] == {
        "leased": 40,
        "scoring": 8,
        "waiting": 30,
        "taken": 0,
        "trained": 5760,
        "known": True,
        "bound": 128,
        "batch_groups": 64,
    }
    assert flow["means"]["generate/idle_share"] == pytest.approx(0.25)
    assert flow["means"]["reward/idle_share"] is None


def test_tickets_that_pile_up_at_the_generators_count_beside_those_that_come_back(tmp_path: Path) -> None:
    """10 more are out after 2 s: 140 + 5 a second went out."""
    run = WrittenRun(tmp_path / "first")
    rows = [{**row_of(version), "queue/leased_groups": 30 + 2.5 * (version - 1)} for version in range(1, 6)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert views.overview(read(run))["flow"]["tickets_per_s"] == pytest.approx(145.0)  # type: ignore[index]


def test_rows_that_lack_what_newer_ones_have_leave_it_open(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "old")
    old = {key: value for key, value in row_of(1).items() if not key.startswith(("score/", "queue/leased", "generate/groups"))}
    (run.folder / "metrics.jsonl").write_text(json.dumps(old) + "\n")

    flow = overview(run)["flow"]

    assert isinstance(flow, dict)
    assert (flow["tickets_per_s"], flow["scored_per_s"], flow["updates_per_s"]) == (None, None, None)
    assert flow["means"]["score/idle_share"] is None


def test_the_verdict_names_the_box_that_holds_the_run_up(tmp_path: Path) -> None:
    """The learner trains 0.3 of each 0.5 s and the generators sample 0.48 of them."""
    run = WrittenRun(tmp_path / "first")
    rows = [{**row_of(version), "generate/idle_share": 0.04, "queue/wait_s": 0.2} for version in range(1, 30)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    view = overview(run)

    assert view["bottleneck"] == "generators"
    assert "generation-bound" in str(view["verdict"])


def test_a_run_that_ended_keeps_the_last_verdict_of_its_driver(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first")
    run.update(30)
    run.write_state("finished")
    (run.folder / "summary.json").write_text(json.dumps({"exit": "success", "verdict": "what the driver said"}))

    assert overview(run)["verdict"] == "what the driver said"


def test_a_run_without_updates_has_no_numbers_and_no_curves(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first")

    view, curves = overview(run), views.curves(read(run))

    assert (view["phase"], view["eta_s"], view["verdict"]) == ("starting", None, "")
    assert curves["rows"] == 0
    assert curves["training"] == {"curves": [], "columns": {}}


def test_rows_that_were_taken_back_leave_the_curves_and_come_anew(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first")
    run.update(30)
    folder = read(run)
    before = views.overview(folder)["stamps"]

    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "new").write_text("".join(lines[:20]))
    (run.folder / "new").replace(run.folder / "metrics.jsonl")
    run.version = 20
    run.update(2)
    folder.refresh()

    columns = views.curves(folder)["training"]["columns"]  # type: ignore[index]
    assert columns["version"] == list(range(1, 23))
    assert views.overview(folder)["stamps"] != before


def test_a_driver_that_gives_no_sign_of_life_is_silent_and_one_that_ended_is_not(tmp_path: Path) -> None:
    run, done = WrittenRun(tmp_path / "killed"), WrittenRun(tmp_path / "done")
    run.update(3)
    done.finish()
    for each in (run, done):
        each.go_silent()

    assert [(read(each).phase, read(each).live) for each in (run, done)] == [("silent", False), ("finished", False)]


def test_a_resumed_run_does_not_show_the_error_of_the_driver_before(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "again")
    run.write_state("failed")
    (run.folder / "summary.json").write_text(json.dumps({"exit": "failed", "error": "boom"}))
    assert overview(run)["error"] == "boom"

    run.update(1)

    assert overview(run)["error"] == ""


def test_actors_are_told_with_their_health_their_restarts_and_their_incidents(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first", "scorer.count=2")
    run.update(3)
    run.write_incident({"event": "lost", "name": "generator-0", "time": 1.0, "cause": "it died"})
    run.write_incident({"event": "back", "name": "generator-0", "time": 2.0, "after_s": 1.0})
    run.write_incident({"event": "lost", "name": "scorer-1", "time": 3.0, "cause": "silent"})

    view = overview(run)

    actors = {actor["name"]: actor for actor in view["actors"]}  # type: ignore[attr-defined, index]
    assert [*actors] == ["generator-0", "scorer-0", "scorer-1", "replay_queue", "learner", "weight_broadcaster", "training_state"]
    assert actors["generator-0"] == {"name": "generator-0", "does": "installed version 3", "restarts": 1, "health": "up"}
    assert (actors["scorer-1"]["health"], actors["scorer-1"]["restarts"]) == ("down", 1)
    assert [each["name"] for each in view["incidents"]] == ["scorer-1", "generator-0", "generator-0"]  # type: ignore[attr-defined]


def test_evaluations_have_their_intervals_and_a_later_one_of_a_version_replaces_it(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first")
    for version, score in ((0, 0.4), (20, 0.5), (20, 0.6)):
        run.evaluate(version, score)

    folder = read(run)

    columns = views.curves(folder)["evaluations"]["columns"]  # type: ignore[index]
    assert columns["evaluate/score"] == [0.4, 0.6]
    assert columns["evaluate/score_high"] == pytest.approx([0.45, 0.65])
    assert views.evaluated(folder)["points"] == [
        {"version": 0.0, "score": 0.4, "low": pytest.approx(0.35), "high": pytest.approx(0.45)},
        {"version": 20.0, "score": 0.6, "low": pytest.approx(0.55), "high": pytest.approx(0.65)},
    ]


def test_the_newest_samples_of_the_journal_come_with_their_rewards(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first")
    journal = Journal(run.folder / "journal")
    folder = read(run)
    assert views.samples(folder)["sampled"] == []
    for number in range(6):
        journal.append("K", encode([make_scored(make_ticket(number), scores=(0.0, number))]))
        journal.append("U", b"{}")
    journal.close()

    sampled = views.samples(folder)["sampled"]

    assert isinstance(sampled, list)
    assert [group["completions"][0]["score"] for group in sampled] == [5.0, 4.0, 3.0, 2.0]
    assert views.samples(folder)["sampled"] == sampled


def test_a_torn_or_garbled_journal_leaves_the_samples_that_were_there(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first")
    journal = Journal(run.folder / "journal")
    journal.append("K", encode([make_scored(make_ticket(1), scores=(0.0, 1.0))]))
    journal.append("K", b"GROUPS 2 nonsense")
    journal.close()
    segment = run.folder / "journal" / "segment-00000000.log"
    segment.write_bytes(segment.read_bytes() + b"RCRD" + b"\xff" * 200)

    sampled = views.samples(read(run))["sampled"]

    assert isinstance(sampled, list)
    assert len(sampled) == 1


def test_texts_that_hide_or_reorder_are_shown_and_long_ones_shortened(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first")
    run.write_samples(HOSTILE, LONG)
    run.write_incident({"event": "lost", "name": HOSTILE, "time": "now", "cause": HOSTILE, "after_s": float("nan")})
    run.write_state("failed")
    (run.folder / "summary.json").write_text(json.dumps({"error": HOSTILE, "dropped": {HOSTILE: 3, "failed: " + HOSTILE: 2}}))

    text = json.dumps([overview(run), views.samples(read(run))], ensure_ascii=False)

    assert not {"\u202e", "\u2066", "\x00", "\x1b"} & set(text)
    assert "[U+202E]" in text
    assert LONG[: MAX_TEXT + 1] not in text


GARBLED = (b"", b"{", b"[]", b"null", b'{"queue": 3, "actors": [], "version": "x", "start": {"samples": [1]}}\n', b"\xff\xfe\x00")


@pytest.mark.parametrize(
    "name", ["state.json", "summary.json", "samples.json", "incidents.jsonl", "evaluations.jsonl", "metrics.jsonl", "config.yaml"]
)
def test_whatever_a_file_holds_there_is_a_page(name: str, tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first")
    run.update(3)
    for content in GARBLED:
        (run.folder / name).write_bytes(content)
        folder = read(run)

        json.dumps([views.overview(folder), views.curves(folder), views.samples(folder), compare({"a": folder})], allow_nan=False)


def test_runs_are_compared_by_their_results_their_settings_and_their_curves(tmp_path: Path) -> None:
    one, two = WrittenRun(tmp_path / "one", "algorithm.name=rloo"), WrittenRun(tmp_path / "two", "max_staleness=0")
    one.update(50)
    two.update(20)
    two.evaluate(0, 0.5)

    view = compare({"a": read(one), "b": read(two)})

    assert view["settings"] == {"algorithm.name": {"a": "rloo", "b": "dpo"}, "max_staleness": {"a": "1", "b": "0"}}
    assert [run["results"]["updates"] for run in view["runs"]] == [50, 20]  # type: ignore[attr-defined]
    columns = view["training"]["columns"]  # type: ignore[index]
    assert (len(columns["a"]["reward/mean"]), len(columns["b"]["reward/mean"])) == (50, 20)
    assert [curve["name"] for curve in view["evaluations"]["curves"]] == ["evaluated-score"]  # type: ignore[index]


def test_runs_are_found_under_a_folder_newest_first_and_nothing_else_has_a_name(tmp_path: Path) -> None:
    runs = [WrittenRun(tmp_path / "runs" / name) for name in ("old", "new")]
    os.utime(runs[0].folder / "config.yaml", (1e9, 1e9))
    (tmp_path / "runs" / "notes").mkdir()
    WrittenRun(tmp_path / "elsewhere")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    catalogue = Catalogue([], tmp_path / "runs")

    with catalogue.listed() as listed:
        assert [run.folder.name for run in listed.values()] == ["new", "old"]
    for name in (name_of(tmp_path / "elsewhere"), "../elsewhere", "", "old"):
        with catalogue.opened(name) as run:
            assert run is None
    with catalogue.opened(name_of(runs[1].folder)) as run:
        assert run is not None
        assert run.folder == runs[1].folder


def test_a_folder_with_a_config_alone_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert not is_run(tmp_path)
    (tmp_path / "LOCK").touch()
    assert is_run(tmp_path)


def test_what_the_folder_writer_writes_is_what_the_page_reads(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "first")
    run.update(10)

    assert overview(run)["numbers"]["reward_mean"] == pytest.approx(reward_at(10))  # type: ignore[index]

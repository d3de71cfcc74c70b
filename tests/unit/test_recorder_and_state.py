"""The run folder: rows, state and summary as a reader finds them, after a crash too."""

import json
import logging
import os
from pathlib import Path

import pytest

from async_rlhf.config import load_config
from async_rlhf.errors import ConfigError
from async_rlhf.evaluation import Evaluation, Sample
from async_rlhf.evaluation_log import read_accuracies, read_samples, write_samples
from async_rlhf.recorder import (
    Recorder,
    keep_config,
    make_run_folder,
    read_rows,
    rows_of_config,
    write_origin,
    write_summary,
)
from async_rlhf.run_plan import RunPlan
from async_rlhf.scores import ScoreMoments
from async_rlhf.state import TrainingState, read_state, state_from_json, write_atomically

STATE = TrainingState(
    run_id="quick-1",
    phase="training",
    version=3,
    num_updates=80,
    optimizer_steps=6,
    prompts=24,
    completions=48,
    tokens=211,
    seed=7,
    reward_mean=0.375,
    best_reward_mean=0.5,
    staleness_max=1,
    weights_version=3,
    elapsed_s=12.5,
    session=2,
    restarts={"generator-0": 1},
    checkpoint=2,
    queue={"leased": 4, "waiting": 2},
    score_moments=ScoreMoments(count=48, mean=1 / 3, sum_squares=0.1, recent=(0.5, -1.25, 1e-7)),
    actors={"generator-0.0": "installed version 3"},
    updated_at=1.5e9,
)


def record(folder: Path, *rows: dict[str, float]) -> None:
    recorder = Recorder(folder)
    for row in rows:
        recorder.write(row)
    recorder.close()


def test_rows_are_read_as_they_were_written(tmp_path: Path):
    rows = [{"version": 1, "reward/mean": 0.1}, {"version": 2, "reward/mean": 1 / 3}]

    record(tmp_path, *rows)

    assert read_rows(tmp_path) == rows


def test_a_row_is_there_before_the_recorder_is_closed(tmp_path: Path):
    recorder = Recorder(tmp_path)

    recorder.write({"version": 1, "reward/mean": 0.25})

    assert read_rows(tmp_path) == [{"version": 1, "reward/mean": 0.25}]
    recorder.close()


@pytest.mark.parametrize("cut", ['{"version": 2, "rew', '{"version": 2}', ""])
def test_a_last_line_without_its_end_is_left_out(cut: str, tmp_path: Path):
    """Even one that looks complete: only the newline says so."""
    record(tmp_path, {"version": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)

    assert read_rows(tmp_path) == [{"version": 1}]


@pytest.mark.parametrize("damaged", ['{"vers', "5", "[]", "null", "{}", '"text"', "\x00", "[" * 10000])
def test_damaged_lines_are_left_out(tmp_path: Path, damaged: str):
    (tmp_path / "metrics.jsonl").write_text(f'{{"version": 1}}\n{damaged}\n{{"version": 3}}\n')

    assert read_rows(tmp_path) == [{"version": 1}, {"version": 3}]


def test_bytes_that_are_no_text_cost_only_their_line(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"version": 1}\n\xff\xfe\n{"version": 3}\n')

    assert read_rows(tmp_path) == [{"version": 1}, {"version": 3}]


def test_rows_of_the_config_are_those_since_it_was_changed(tmp_path: Path):
    record(tmp_path, {"version": 1, "session": 0}, {"version": 2, "session": 1}, {"version": 3, "session": 2})
    all_rows = rows_of_config(tmp_path)
    (tmp_path / "config.yaml").write_text("updates: 3\n")
    keep_config(tmp_path, 1)

    assert len(all_rows) == 3 and [row["version"] for row in rows_of_config(tmp_path)] == [2, 3]


def test_a_folder_without_rows_has_none(tmp_path: Path):
    assert read_rows(tmp_path) == []


def test_metrics_go_to_tensorboard_under_their_version_and_plain_fields_do_not(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(tmp_path, {"version": 1, "time_s": 3.5, "reward/mean": 0.25}, {"version": 2, "time_s": 4.0, "reward/mean": 0.75})

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert [*tags["scalars"], *tags["tensors"]] == ["reward/mean"]
    assert [event.step for event in events.Tensors("reward/mean")] == [1, 2]
    assert [event.tensor_proto.float_val[0] for event in events.Tensors("reward/mean")] == [0.25, 0.75]


# State.


def test_state_comes_back_from_json_as_it_was():
    back = state_from_json(STATE.to_json())

    assert back == STATE
    assert isinstance(back.score_moments, ScoreMoments) and isinstance(back.score_moments.recent, tuple)


def test_state_is_read_from_the_run_folder(tmp_path: Path):
    write_atomically(tmp_path / "state.json", STATE.to_json())

    assert read_state(tmp_path) == STATE


def test_a_folder_without_state_is_no_run_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"is no run folder: it has no state\.json"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting"),
        ("[]", "has no attribute 'get'"),
        ('{"phase": "training"}', "missing 8 required"),
        (json.dumps({**json.loads(STATE.to_json()), "version": "many"}), "version must be <class 'int'>, got 'many'"),
        (json.dumps({**json.loads(STATE.to_json()), "actors": None}), "actors must be "),
        (json.dumps({**json.loads(STATE.to_json()), "reward_mean": "high"}), r"reward_mean must be float \| None, got 'high'"),
    ],
    ids=["cut", "a list", "fields missing", "a text for a number", "nothing for a map", "a text for a number or nothing"],
)
def test_a_damaged_state_is_named_with_what_is_wrong_and_a_remedy(tmp_path: Path, text: str, said: str):
    (tmp_path / "state.json").write_text(text)

    with pytest.raises(ConfigError, match=rf"state\.json cannot be read: .*{said}.*; put a copy back"):
        read_state(tmp_path)


def test_a_reader_that_has_the_file_open_keeps_the_old_text(tmp_path: Path):
    """Written in place, the open file would show the new text, or a half of it."""
    file = tmp_path / "state.json"
    write_atomically(file, "old" * 1000)
    with file.open() as reader:
        write_atomically(file, "new")

        assert reader.read() == "old" * 1000
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path):
    file = tmp_path / "state.json"
    write_atomically(file, "old")

    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "half \ud800")

    assert file.read_text() == "old"


# The folder.


def test_a_new_run_folder_holds_a_config_that_loads_to_the_same(tmp_path: Path):
    config = load_config(overrides=[f"run.dir={tmp_path / 'deep' / 'run'}", "updates=9", "algorithm.name=rloo"]).config

    folder = make_run_folder(config)

    assert folder == tmp_path / "deep" / "run"
    assert load_config([folder / "config.yaml"]).config == config


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path):
    config = load_config(overrides=[f"run.dir={tmp_path}"]).config
    make_run_folder(config)
    before = (tmp_path / "config.yaml").read_text()

    with pytest.raises(ConfigError, match="already holds a run; choose another folder"):
        make_run_folder(load_config(overrides=[f"run.dir={tmp_path}", "updates=9"]).config)

    assert (tmp_path / "config.yaml").read_text() == before


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="cannot be written"):
        make_run_folder(load_config(overrides=[f"run.dir={tmp_path / 'file' / 'run'}"]).config)


def test_without_a_folder_the_run_goes_under_runs_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    folder = make_run_folder(load_config(overrides=["run.name=demo"]).config)

    assert folder.parent == tmp_path / "runs" and folder.name.startswith("demo-")


def test_summary_and_samples_are_plain_json(tmp_path: Path):
    sample = Sample(prompt="1+1=", completion="3", expected="2", score=0.0)
    start = Evaluation(version=0, temperature=0.0, samples=(sample,))
    final = Evaluation(version=9, temperature=0.0, samples=(Sample(prompt="1+1=", completion="2", expected="2", score=1.0), sample))

    write_summary(tmp_path, {"accuracy": final.accuracy})
    write_samples(tmp_path, "start", start)
    write_samples(tmp_path, "final", final)

    assert json.loads((tmp_path / "summary.json").read_text()) == {"accuracy": 0.5}
    samples = json.loads((tmp_path / "samples.json").read_text())
    (written,) = samples["start"]["samples"]
    assert written.items() >= {"prompt": "1+1=", "completion": "3", "expected": "2", "score": 0.0}.items()
    assert samples["final"]["version"] == 9
    assert read_samples(tmp_path) == samples and read_accuracies(tmp_path) == {"start": 0.0, "final": 0.5}


def test_an_evaluation_that_is_made_again_replaces_its_own_and_leaves_the_other(tmp_path: Path):
    first, second = (
        Evaluation(version=version, temperature=0.0, samples=(Sample(prompt="p", completion="c", expected="c", score=score),))
        for version, score in ((4, 0.25), (9, 0.75))
    )
    write_samples(tmp_path, "start", first)
    write_samples(tmp_path, "final", first)

    write_samples(tmp_path, "final", second)

    assert read_accuracies(tmp_path) == {"start": 0.25, "final": 0.75}


def test_a_folder_without_evaluations_has_none(tmp_path: Path):
    assert read_samples(tmp_path) == {} and read_accuracies(tmp_path) == {}


def test_rows_of_updates_that_will_be_trained_again_are_taken_back_and_the_recorder_goes_on(tmp_path: Path):
    recorder = Recorder(tmp_path)
    for version in (1, 2, 3, 4):
        recorder.write({"version": version})

    recorder.cut_after(2)

    assert read_rows(tmp_path) == [{"version": 1}, {"version": 2}]
    recorder.write({"version": 3, "again": 1.0})
    recorder.close()
    assert read_rows(tmp_path) == [{"version": 1}, {"version": 2}, {"version": 3, "again": 1.0}]


def test_taking_rows_back_drops_a_last_line_that_a_crash_cut(tmp_path: Path):
    record(tmp_path, {"version": 1}, {"version": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"version": 3, "rew')

    recorder = Recorder(tmp_path)
    recorder.cut_after(9)
    recorder.write({"version": 3})
    recorder.close()

    assert read_rows(tmp_path) == [{"version": 1}, {"version": 2}, {"version": 3}]


def test_incidents_are_lines_in_the_order_in_which_they_happened(tmp_path: Path):
    recorder = Recorder(tmp_path)
    entries = [{"event": "lost", "name": "queue", "cause": 'a "quoted"\ncause'}, {"event": "back", "name": "queue", "after_s": 0.5}]

    for entry in entries:
        recorder.write_incident(entry)

    assert [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()] == entries
    recorder.close()


class Broken:
    """A sink of which one method fails."""

    def __init__(self, fails: str) -> None:
        self._fails = fails
        self.told: list[str] = []
        self._tell("made")

    def _tell(self, what: str) -> None:
        self.told.append(what)
        if what == self._fails:
            raise OSError(f"no room for {what}")

    def update(self, row: object) -> None:
        self._tell("update")

    def evaluation(self, row: object) -> None:
        self._tell("evaluation")

    def incident(self, entry: object) -> None:
        self._tell("incident")

    def cut_after(self, version: int) -> None:
        self._tell("cut_after")

    def close(self) -> None:
        self._tell("close")


@pytest.mark.parametrize("fails", ["made", "update", "incident", "cut_after", "close"])
def test_a_run_goes_on_without_a_sink_that_failed_which_is_told_once(fails: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        recorder = Recorder(tmp_path, {"the other sink": lambda: Broken(fails)})
        recorder.cut_after(0)
        for version in (1, 2):
            recorder.write({"version": version})
            recorder.write_incident({"event": "lost", "name": f"generator-{version}"})
        recorder.close()

    assert [row["version"] for row in read_rows(tmp_path)] == [1, 2]
    assert len((tmp_path / "incidents.jsonl").read_text().splitlines()) == 2
    assert [record.getMessage() for record in caplog.records] == [f"the run goes on without the other sink: OSError: no room for {fails}"]


def test_a_sink_that_failed_gets_nothing_more_but_is_closed(tmp_path: Path):
    made = Broken("update")
    recorder = Recorder(tmp_path, {"other": lambda: made})

    recorder.write({"version": 1})
    recorder.write({"version": 2})
    recorder.close()

    assert made.told == ["made", "update", "close"]


def test_tensorboard_may_fail_and_metrics_jsonl_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tensorboard").write_text("a file where its folder would be")
    recorder = Recorder(tmp_path)
    recorder.write({"version": 1, "train/loss": 0.5})
    recorder.close()
    assert read_rows(tmp_path) == [{"version": 1, "train/loss": 0.5}]

    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        Recorder(tmp_path)


def test_the_origin_names_what_a_resumed_run_begins_from(tmp_path: Path):
    plan = RunPlan(config=load_config().config, run_folder=tmp_path, model_folder=tmp_path / "start", reward="a.b:c", metric="d.e:f")

    write_origin(plan)

    origin = json.loads((tmp_path / "origin.json").read_text())
    assert origin == {"model_folder": str(tmp_path / "start"), "reward": "a.b:c", "metric": "d.e:f"}


def test_a_run_is_named_after_its_folder(tmp_path: Path):
    plan = RunPlan(config=load_config().config, run_folder=tmp_path / "quick-7", model_folder=tmp_path, reward="", metric="")
    assert (plan.run_id, plan.session, plan.checkpoint) == ("quick-7", 0, None)

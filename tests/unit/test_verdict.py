"""The verdict: the right name for each constructed bottleneck, honest gains, and advice that can be followed."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_rlhf.commands.drive import _Watcher  # pyright: ignore[reportPrivateUsage]
from async_rlhf.config import Config, load_config, to_yaml
from async_rlhf.config.algorithms import AlgorithmConfig
from async_rlhf.config.prompts import PromptsConfig, SourceConfig
from async_rlhf.config.schema import GeneratorConfig, LearnerConfig, ScorerConfig, WeightsConfig
from async_rlhf.progress import Progress
from async_rlhf.recorder import Recorder, keep_config
from async_rlhf.run_verdict import RunningVerdict, own_cores, verdict_of_folder
from async_rlhf.stage_times import WINDOW, settled, stage_times
from async_rlhf.state import TrainingState
from async_rlhf.verdict import Bottleneck, Verdict, verdict_of

CONFIG = Config(batch_groups=64, completions_per_prompt=4, generator=GeneratorConfig(max_inflight=512))
LIVE = PromptsConfig(sources={"new": SourceConfig(path="rows.jsonl", live=True)})


def made_rows(
    num: int = 8, *, update_s: float = 1.0, wait: float, step: float, busy: float, install: float = 0.0, **others: float
) -> list[dict[str, float]]:
    """Rows of updates of `update_s` seconds; the other times are shares of it, `busy` the generators' share in engine steps."""
    return [
        {
            "version": version,
            "time_s": 10.0 + update_s * version,
            "queue/wait_s": wait * update_s,
            "train/step_s": step * update_s,
            "generate/idle_share": 1 - busy,
            "weights/install_s": install * update_s,
            **{key.replace("_idle", "/idle_share"): value for key, value in others.items()},
        }
        for version in range(3, 3 + num)
    ]


def judged(config: Config = CONFIG, num_cores: int | None = None, **shares: Any) -> Verdict:
    return verdict_of(made_rows(**shares), config, num_cores)


def test_two_generators_that_a_learner_waits_for_should_be_four():
    """t_gen .95 of an update, t_learn .57: four halve t_gen, so the learner bounds the gain by .95 / .57."""
    config = replace(CONFIG, generator=GeneratorConfig(count=2, max_inflight=512))

    verdict = judged(config, wait=0.43, step=0.57, busy=0.95)

    assert verdict.bottleneck is Bottleneck.GENERATION and verdict.changes == ("generator.count=4",)
    assert verdict.gain == pytest.approx(0.95 / 0.57)
    assert verdict.text == "learner idle 43 %: generation-bound; 2 -> 4 generators would give about 1.7x"
    assert (verdict.generator_idle, verdict.learner_idle) == (pytest.approx(0.05), pytest.approx(0.43))


def test_a_learner_with_time_for_another_pass_is_told_so():
    verdict = judged(wait=0.7, step=0.25, busy=0.95)

    assert verdict.text.endswith("; or algorithm.epochs_per_batch 2, for which the learner has the time")


def test_more_generators_do_not_raise_the_share_of_an_install():
    """.70 sampling and .20 install: four times as many generators leave .175 + .20, and the learner's .30 is below that."""
    verdict = judged(wait=0.7, step=0.3, busy=0.70, install=0.20)

    assert verdict.changes == ("generator.count=4",) and verdict.gain == pytest.approx(0.90 / 0.375)


def test_generators_that_joined_during_the_run_are_counted():
    rows = [row | {"generate/generators": 2.9} for row in made_rows(wait=0.5, step=0.5, busy=0.95)]

    assert "3 -> 6 generators" in verdict_of(rows, CONFIG).text


def test_there_are_no_more_generators_than_groups_to_sample():
    few = replace(CONFIG, batch_groups=1, max_staleness=1, learner=LearnerConfig(num_ranks=1))

    assert judged(few, wait=0.9, step=0.1, busy=0.95).changes == ("generator.count=2",)
    alone = judged(replace(few, generator=GeneratorConfig(count=2)), wait=0.9, step=0.1, busy=0.95)
    assert alone.changes == () and alone.gain == 1.0 and "faster generators" in alone.text


def test_more_completions_at_once_are_named_where_the_engine_holds_few_of_those_admitted():
    narrow = replace(CONFIG, generator=GeneratorConfig(max_inflight=16))

    assert "or more than generator.max_inflight 16" in judged(narrow, wait=0.5, step=0.5, busy=0.95).text
    assert "max_inflight" not in judged(wait=0.5, step=0.5, busy=0.95).text


def test_reading_anew_what_runs_is_named_where_it_takes_much_of_the_generators_time_and_can_be_spared():
    """.70 sampling, .05 load, .15 the canary's step: a sixth of what the generators do."""

    def text(canary_s: float, **weights: Any) -> str:
        rows = [row | {"weights/pause_s": 0.05, "weights/canary_s": canary_s} for row in made_rows(wait=0.5, step=0.5, busy=0.70)]
        return verdict_of(rows, replace(CONFIG, weights=WeightsConfig(**weights))).text

    assert text(0.15).endswith("; or weights.on_update keep_cache, as 15 % of the time is reading anew what runs")
    assert "keep_cache" not in text(0.05) and "keep_cache" not in text(0.15, on_update="keep_cache")
    assert "keep_cache" not in text(0.15, on_update="drain")


def test_a_push_that_is_mostly_reading_anew_says_so():
    rows = [row | {"weights/pause_s": 0.1, "weights/canary_s": 0.5} for row in made_rows(wait=0.5, step=0.5, busy=0.3)]
    verdict = verdict_of(rows, CONFIG)

    assert verdict.bottleneck is Bottleneck.WEIGHTS and "or weights.on_update keep_cache, as 50 %" in verdict.text
    pushed = verdict_of([row | {"train/take_s": 0.5, "weights/export_s": 0.0, "queue/wait_s": 0.0} for row in rows], CONFIG)
    assert pushed.bottleneck is Bottleneck.WEIGHTS and "keep_cache" not in pushed.text, "the learner's push is what holds it up"


def test_generators_that_a_learner_holds_back_want_more_ranks():
    """t_learn 1.0 of which .1 is the push; two ranks leave .45 + .1, above the generators' .5."""
    verdict = judged(wait=0.0, step=0.9, busy=0.5)

    assert verdict.bottleneck is Bottleneck.TRAINING and verdict.changes == ("learner.num_ranks=2",)
    assert verdict.gain == pytest.approx(1 / 0.55)
    assert verdict.text == "generators idle 50 %: training-bound; 1 -> 2 learner ranks would give about 1.8x"


def test_ranks_are_as_many_as_the_batch_can_be_split_over():
    thirds = replace(CONFIG, batch_groups=9)

    assert judged(thirds, wait=0.0, step=1.0, busy=0.6).changes == ("learner.num_ranks=3",)
    assert "cannot be split" in judged(replace(thirds, batch_groups=1), wait=0.0, step=1.0, busy=0.2).text


def test_fewer_passes_are_offered_to_a_learner_that_makes_several():
    config = replace(CONFIG, algorithm=AlgorithmConfig(epochs_per_batch=2))

    assert "or algorithm.epochs_per_batch 2 -> 1 about 2.0x" in judged(config, wait=0.0, step=1.0, busy=0.3).text


def test_generators_too_many_for_the_learner_are_counted():
    config = replace(CONFIG, generator=GeneratorConfig(count=8))

    assert "; 2 of the 8 generators would do" in judged(config, wait=0.0, step=1.0, busy=0.2).text


def test_slow_scorers_are_named_with_the_setting_that_has_more_of_them():
    verdict = judged(wait=0.6, step=0.4, busy=0.5, score_idle=0.02)

    assert verdict.bottleneck is Bottleneck.SCORING and verdict.changes == ("scorer.count=2",)
    assert verdict.gain == pytest.approx(0.98 / 0.5) and verdict.scorer_idle == pytest.approx(0.02)
    assert "scorers at work 98 %" in verdict.text


def test_slow_reward_actors_are_told_apart_from_scorers():
    assert judged(wait=0.6, step=0.4, busy=0.5, score_idle=0.8, reward_idle=0.0).changes == ("reward.count=2",)


@pytest.mark.parametrize("shares", [{"wait": 0.0, "step": 0.3, "busy": 0.5}, {"wait": 0.6, "step": 0.3, "busy": 0.5, "install": 0.45}])
def test_pushes_that_take_longer_than_the_work_want_larger_batches(shares: dict[str, Any]):
    verdict = judged(**shares)

    assert verdict.bottleneck is Bottleneck.WEIGHTS
    assert verdict.changes == ("batch_groups=128", "algorithm.minibatches_per_batch=2")


def test_twice_the_batch_halves_the_share_of_the_push():
    """1.0 = .3 + .7 pushing; for two batches .6 + .7 = 1.3, and the generators need 2 x .5: 2 / 1.3."""
    assert judged(wait=0.0, step=0.3, busy=0.5).gain == pytest.approx(2 / 1.3)


def test_synchronous_training_waits_on_itself():
    verdict = judged(replace(CONFIG, max_staleness=0), wait=0.6, step=0.4, busy=0.55)

    assert verdict.bottleneck is Bottleneck.WAITING and verdict.changes == ("max_staleness=1",)
    assert verdict.gain == pytest.approx(1 / 0.55)
    assert "they wait on each other; max_staleness 1 would give about 1.8x" in verdict.text


def test_synchronous_training_is_at_most_twice_as_slow_as_one_step_off():
    """Three equal stages would promise 3x, but only twice as many groups are on their way."""
    assert judged(replace(CONFIG, max_staleness=0), wait=0.67, step=0.33, busy=0.33, score_idle=0.67).gain == pytest.approx(2.0)


def test_synchronous_training_with_one_long_stage_is_told_of_that_stage():
    assert judged(replace(CONFIG, max_staleness=0), wait=0.95, step=0.05, busy=0.93).bottleneck is Bottleneck.GENERATION


def test_a_tight_bound_that_holds_everybody_up_is_told():
    """Nobody is at work for more than half of the time: 3 instead of 2 batches on their way give at most 1.5x."""
    verdict = judged(wait=0.5, step=0.5, busy=0.5, score_idle=0.8)

    assert verdict.bottleneck is Bottleneck.WAITING and verdict.changes == ("max_staleness=2",) and verdict.gain == pytest.approx(1.5)
    assert "not measured" not in verdict.text


def test_a_live_source_that_brings_too_little_is_told():
    """64 prompts a second come; the generators could sample them in half of the time."""
    verdict = judged(replace(CONFIG, prompts=LIVE), wait=0.7, step=0.3, busy=0.5)

    assert verdict.bottleneck is Bottleneck.PROMPTS and verdict.changes == () and verdict.gain == pytest.approx(2.0)
    assert "3,840 a minute are trained, about 7,680 could be" in verdict.text


def test_a_live_source_that_keeps_up_is_not_to_blame():
    assert judged(replace(CONFIG, prompts=LIVE), wait=0.4, step=0.5, busy=0.95).bottleneck is Bottleneck.GENERATION


def test_stages_that_are_all_at_work_are_balanced():
    verdict = judged(wait=0.03, step=0.95, busy=0.93, install=0.03)

    assert verdict.bottleneck is Bottleneck.BALANCED and verdict.gain == 1.0 and verdict.changes == ()
    assert verdict.text == "balanced: at work generators 96 %, learner 97 %; only more of all (1 and 1 now) would give more"


def test_taken_cores_are_named_beside_advice_that_needs_more():
    assert "on more than this machine's 2 cores, which are taken" in judged(num_cores=2, wait=0.5, step=0.5, busy=0.95).text
    assert "cores" not in judged(num_cores=8, wait=0.5, step=0.5, busy=0.95).text


@pytest.mark.parametrize(
    "rows",
    [
        [],
        made_rows(3, wait=0.5, step=0.5, busy=0.9),
        [row | {"version": row["version"] - 3} for row in made_rows(5, wait=0.5, step=0.5, busy=0.9)],
        [{key: value for key, value in row.items() if key != "queue/wait_s"} for row in made_rows(wait=0.5, step=0.5, busy=0.9)],
        [row | {"train/step_s": math.nan} for row in made_rows(wait=0.5, step=0.5, busy=0.9)],
        [row | {"time_s": 1.0} for row in made_rows(wait=0.5, step=0.5, busy=0.9)],
    ],
    ids=["none", "few", "the first ones", "key missing", "not a number", "no time passes"],
)
def test_what_is_not_known_is_not_judged(rows: list[dict[str, float]]):
    verdict = verdict_of(rows, CONFIG)

    assert verdict.bottleneck is Bottleneck.UNKNOWN and verdict.gain == 1.0 and verdict.learner_idle is None
    assert verdict.text == "too little is known yet: a verdict takes 5 updates"


def test_only_the_last_updates_count():
    before = made_rows(30, wait=0.0, step=1.0, busy=0.3)
    shift = before[-1]
    after = [
        row | {"version": row["version"] + shift["version"], "time_s": row["time_s"] + shift["time_s"]}
        for row in made_rows(WINDOW, wait=0.5, step=0.4, busy=0.95)
    ]

    assert verdict_of([*before, *after], CONFIG).bottleneck is Bottleneck.GENERATION


def late(rows: list[dict[str, float]], index: int, seconds: float) -> list[dict[str, float]]:
    """The same, with so much more before the update of that index was over."""
    return [row | {"time_s": row["time_s"] + (seconds if number >= index else 0.0)} for number, row in enumerate(rows)]


@pytest.mark.parametrize(("gap_s", "every"), [(40.0, 100), (3.0, 10), (8.0, 10)], ids=["a restart", "checkpoints", "long checkpoints"])
@pytest.mark.parametrize("push", [{}, {"train/take_s": 0.02, "weights/export_s": 0.03}], ids=["push not measured", "push measured"])
@pytest.mark.parametrize(
    ("shares", "expected"),
    [({"wait": 0.5, "step": 0.45, "busy": 0.95}, Bottleneck.GENERATION), ({"wait": 0.05, "step": 0.9, "busy": 0.4}, Bottleneck.TRAINING)],
    ids=["generation", "training"],
)
def test_gaps_between_updates_change_no_verdict(
    gap_s: float, every: int, push: dict[str, float], shares: dict[str, float], expected: Bottleneck
):
    rows = even = [row | push for row in made_rows(WINDOW + 1, **shares)]
    for index in range(5, len(rows), every):
        rows = late(rows, index, gap_s)

    verdict = verdict_of(rows, CONFIG)

    assert verdict.bottleneck is expected and verdict.text == verdict_of(even, CONFIG).text


def test_what_is_neither_training_nor_push_is_not_taken_for_a_push():
    """.45 train_step, .1 push, .45 of something else in every update; it is named."""
    rows = [row | {"train/take_s": 0.04, "weights/export_s": 0.06} for row in made_rows(wait=0.0, step=0.45, busy=0.5)]
    times, verdict = stage_times(rows), verdict_of(rows, CONFIG)

    assert times is not None and (times.push_s, times.other_s) == (pytest.approx(0.1), pytest.approx(0.45))
    assert verdict.bottleneck is Bottleneck.TRAINING and "45 % of the time is neither training nor push" in verdict.text
    assert verdict.gain == pytest.approx(1 / (0.45 / 4 + 0.55))  # four ranks


def test_an_update_in_which_an_actor_was_lost_does_not_count_where_it_took_long():
    """The learner waited 5 s for a generator to be back: that is no hint on its speed."""
    rows = late(made_rows(wait=0.1, step=0.85, busy=0.5), 4, 5.0)
    rows = [row | {"supervision/restarts": float(number >= 4)} for number, row in enumerate(rows)]
    rows[4]["queue/wait_s"] += 5.0

    assert [row["version"] for _, row in settled(rows)] == [4, 5, 6, 8, 9, 10]
    assert len(settled([row | {"supervision/restarts": 0.0} for row in rows])) == 7


def test_only_updates_that_follow_each_other_in_one_driver_are_settled():
    rows = made_rows(9, wait=0.5, step=0.4, busy=0.95)
    rows = [row | {"session": float(number >= 5)} for number, row in enumerate(rows) if number != 2]

    assert [row["version"] for _, row in settled(rows)] == [4, 7, 9, 10, 11]


def test_a_pause_that_was_measured_replaces_the_whole_install():
    rows = [row | {"weights/pause_s": 0.01, "weights/canary_s": 0.02} for row in made_rows(wait=0.5, step=0.5, busy=0.6, install=0.3)]
    times = stage_times(rows)

    assert times is not None and times.pause_s == pytest.approx(0.03)


share = st.floats(0.0, 1.0)
configs = st.builds(
    lambda eta, b, count, ranks, parts, epochs, scorers, live: replace(
        CONFIG,
        max_staleness=eta,
        batch_groups=b * ranks * parts,
        generator=GeneratorConfig(count=count),
        learner=LearnerConfig(num_ranks=ranks),
        algorithm=AlgorithmConfig(epochs_per_batch=epochs, minibatches_per_batch=parts),
        scorer=ScorerConfig(count=scorers),
        prompts=LIVE if live else PromptsConfig(),
    ),
    *(st.integers(low, high) for low, high in ((0, 64), (1, 100), (1, 4096), (1, 64), (1, 4), (1, 4), (1, 4096))),
    st.booleans(),
)
anything = st.one_of(st.floats(), st.none(), st.text(max_size=3), st.integers(), st.booleans())
keys = (
    "version",
    "time_s",
    "queue/wait_s",
    "train/step_s",
    "generate/idle_share",
    "weights/install_s",
    "score/idle_share",
    "reward/idle_share",
)


@given(
    config=configs, wait=share, step=share, busy=share, install=share, score_idle=st.none() | share, cores=st.none() | st.integers(1, 64)
)
def test_any_run_gets_shares_gains_and_advice_that_the_config_takes(
    config: Config, wait: float, step: float, busy: float, install: float, score_idle: float | None, cores: int | None
):
    others = {} if score_idle is None else {"score_idle": score_idle}
    verdict = judged(config, cores, wait=wait, step=step, busy=busy, install=install, **others)

    assert verdict.gain >= 1 - 1e-9 and math.isfinite(verdict.gain)
    for idle in (verdict.generator_idle, verdict.learner_idle, verdict.scorer_idle):
        assert idle is None or 0 <= idle <= 1
    assert verdict.text.isascii() and "\n" not in verdict.text
    for change in verdict.changes:
        key, value = change.split("=")
        assert int(value) > 0 and key in verdict.text.replace("learner ranks", "learner.num_ranks").replace("generators", "generator.count")
    ranks, parts = (
        next((int(c.split("=")[1]) for c in verdict.changes if c.startswith(key)), now)
        for key, now in (("learner.num_ranks", config.learner.num_ranks), ("algorithm.minibatches", config.algorithm.minibatches_per_batch))
    )
    groups = next((int(c.split("=")[1]) for c in verdict.changes if c.startswith("batch_groups")), config.batch_groups)
    assert groups % (ranks * parts) == 0


@given(rows=st.lists(st.dictionaries(st.sampled_from(keys), anything), max_size=8), config=configs)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_no_row_makes_it_fail(rows: list[dict[str, Any]], config: Config):
    assert verdict_of(rows, config).text


@given(step=st.floats(0.1, 0.8), more=st.floats(0.0, 0.1), busy=st.floats(0.9, 1.0))
def test_a_slower_learner_never_promises_more_from_more_generators(step: float, more: float, busy: float):
    faster, slower = (judged(wait=1 - part, step=part, busy=busy).gain for part in (step, step + more))

    assert slower <= faster + 1e-9


def test_advice_is_settings_that_the_command_line_takes():
    for wait, step, busy in ((0.5, 0.5, 0.95), (0.0, 1.0, 0.5), (0.0, 0.3, 0.5)):
        changes = judged(wait=wait, step=step, busy=busy).changes
        assert changes and load_config(overrides=["batch_groups=64", *changes]).config != CONFIG


def test_a_run_that_goes_on_is_judged_as_its_rows_come():
    running = RunningVerdict(CONFIG, num_cores=None)

    verdicts = [running.add(row).bottleneck for row in made_rows(4, wait=0.5, step=0.5, busy=0.95)]

    assert verdicts == [Bottleneck.UNKNOWN] * 3 + [Bottleneck.GENERATION]


def test_updates_that_are_trained_again_begin_a_new_verdict():
    running = RunningVerdict(CONFIG, num_cores=None)
    rows = made_rows(wait=0.5, step=0.5, busy=0.95)

    for row in rows:
        running.add(row)

    assert running.add(rows[2]).bottleneck is Bottleneck.UNKNOWN


def test_going_back_to_the_update_just_trained_begins_a_new_verdict_too():
    """The next row follows the last one in its version, but not in time."""
    running = RunningVerdict(CONFIG, num_cores=None)
    watcher = _Watcher(create_autospec(Progress, instance=True), create_autospec(Recorder, instance=True), running)
    rows = made_rows(wait=0.5, step=0.5, busy=0.95)
    for row in rows[:-1]:
        running.add(row)

    watcher.rewound(int(rows[-2]["version"]))

    assert running.add(rows[-1]).bottleneck is Bottleneck.UNKNOWN


def test_cores_are_counted_only_for_a_run_that_has_this_machine_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    alone = own_cores(CONFIG)
    on_gpu = own_cores(replace(CONFIG, generator=GeneratorConfig(num_gpus=1)))
    monkeypatch.setenv("RAY_ADDRESS", "auto")

    assert (alone, on_gpu, own_cores(CONFIG)) == (os.cpu_count(), None, None)


def test_a_folder_whose_config_is_foreign_has_no_verdict(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("updates: 9\nsetting_of_tomorrow: 1\n")

    assert verdict_of_folder(tmp_path) is None


def test_a_folder_is_judged_by_its_rows(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(to_yaml(CONFIG))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made_rows(wait=0.5, step=0.5, busy=0.95)))

    verdict = verdict_of_folder(tmp_path)

    assert verdict is not None and verdict.bottleneck is Bottleneck.GENERATION


def ended(folder: Path, phase: str, said: object, rows: str = "") -> Path:
    """A run folder whose driver said something at an end."""
    lines = "".join(json.dumps(row) + "\n" for row in made_rows(wait=0.5, step=0.5, busy=0.95))
    (folder / "config.yaml").write_text(to_yaml(CONFIG))
    (folder / "metrics.jsonl").write_text(rows + lines)
    fields: dict[str, Any] = {"run_id": "r", "version": 8, "num_updates": 8, "optimizer_steps": 8, "prompts": 1, "completions": 1}
    fields |= {"tokens": 1, "seed": 0, "phase": phase}
    (folder / "state.json").write_text(TrainingState(**fields).to_json())
    (folder / "summary.json").write_text(json.dumps({"verdict": said}))
    return folder


@pytest.mark.parametrize(
    ("phase", "said", "text"),
    [
        ("finished", "what the driver said", "what the driver said"),
        ("interrupted", "what the driver said", "what the driver said"),
        ("training", "of an earlier driver", "learner idle 50 %"),
        ("finished", None, "learner idle 50 %"),
        ("finished", ["no text"], "learner idle 50 %"),
    ],
)
def test_a_run_that_ended_has_the_verdict_that_its_driver_gave(tmp_path: Path, phase: str, said: object, text: str):
    verdict = verdict_of_folder(ended(tmp_path, phase, said))

    assert verdict is not None and verdict.text.startswith(text) and verdict.bottleneck is Bottleneck.GENERATION


def test_damaged_lines_do_not_keep_a_folder_from_its_verdict(tmp_path: Path):
    verdict = verdict_of_folder(ended(tmp_path, "training", None, rows='5\n[1]\n{"vers\nnull\n{}\n'))

    assert verdict is not None and verdict.bottleneck is Bottleneck.GENERATION


def test_updates_under_earlier_settings_are_not_judged_with_the_present_ones(tmp_path: Path):
    folder = ended(tmp_path, "training", None)
    keep_config(folder, 1)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row | {"session": row["version"] // 9}) + "\n" for row in made_rows(wait=0.5, step=0.5, busy=0.95))
    )

    verdict = verdict_of_folder(folder)

    assert verdict is not None and verdict.bottleneck is Bottleneck.UNKNOWN  # two of eight

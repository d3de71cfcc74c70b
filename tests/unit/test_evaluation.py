"""What an evaluation found, in numbers; win-rates and opponents; and the files they go to."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from async_rlhf.config import Config, load_config
from async_rlhf.config.rewards import JudgeConfig
from async_rlhf.errors import ConfigError, RewardError, RunError
from async_rlhf.evaluation import Evaluation, Findings, Sample, expected_of, headline, measure, pair_up
from async_rlhf.evaluation_log import EvaluationLog, read_evaluation, read_evaluations, read_samples
from async_rlhf.evaluation_summary import summarize_evaluations
from async_rlhf.intervals import bootstrap_interval, wilson_interval
from async_rlhf.metrics import METRICS
from async_rlhf.opponents import (
    OPPONENTS,
    REFERENCES,
    ask_model,
    check_opponent,
    find_opponent,
    opponent_of,
    outcomes_by_judge,
    outcomes_by_score,
    references,
    sample_opponent,
)
from async_rlhf.recorder import Recorder
from async_rlhf.types import Prompt
from async_rlhf.winrate import by_score, load_comparer, win_rate
from tests.support.http_server import free_port, serving
from tests.unit.test_judge import prefers_longer


def sample(score: float = 0.0, *, prompt: str = "1+1=", **changed: Any) -> Sample:
    return Sample(**{"prompt": prompt, "completion": f"{score}", "expected": "2", "score": score, **changed})


def evaluation(*samples: Sample, version: int = 0, oldest: int = -1, temperature: float = 0.0) -> Evaluation:
    return Evaluation(version=version, oldest_version=oldest, temperature=temperature, samples=samples)


def findings(version: int, *samples: Sample, newest: int | None = None, stage: Any = "between", **changed: Any) -> Findings:
    greedy = evaluation(*(samples or (sample(),)), version=version if newest is None else newest, oldest=version)
    return Findings(**{"stage": stage, "version": version, "greedy": greedy, **changed})


def prompt(index: int, **columns: str) -> Prompt:
    return Prompt(prompt_id=f"held-out-{index}", text=f"{index}+0=", token_ids=np.array([4], np.int32), columns=columns)


# Win-rates.


def test_win_rate_counts_ties_half() -> None:
    """(2 + 1/2) / 4; three of four prompts decided, two of them won."""
    found = win_rate([1.0, 1.0, 0.5, 0.0])

    assert (found.share, found.wins, found.ties, found.losses) == (0.625, 2, 1, 1)
    assert found.interval == bootstrap_interval([1.0, 1.0, 0.5, 0.0])
    assert found.p_value == 1.0, "2 of 3 fair coins or more extreme, both sides: certain"


def test_win_rate_without_ties_is_a_share_with_its_interval() -> None:
    assert win_rate([1.0] * 8 + [0.0] * 2).interval == wilson_interval(8, 10)


def test_higher_score_wins_and_equal_ones_tie() -> None:
    assert by_score([1.0, 0.5, -2.0], [0.0, 0.5, -1.0]) == [1.0, 0.5, 0.0]


def test_win_rate_of_a_policy_against_itself_is_even_and_turns_around_with_the_sides() -> None:
    own, theirs = [1.0, 0.0, 0.3, 0.3], [0.0, 1.0, 0.2, 0.3]

    assert win_rate(by_score(own, own)).share == 0.5
    assert win_rate(by_score(own, theirs)).share == 1 - win_rate(by_score(theirs, own)).share == 0.625


def test_prompts_that_the_opponent_was_not_asked_stay_undecided() -> None:
    assert outcomes_by_score([1.0, 0.0, 1.0], [0.0, 0.0, 0.0], ["a", "b", None]) == [1.0, 0.5, None]


def test_judge_that_is_torn_between_its_two_answers_wins_or_loses_by_the_greater_part() -> None:
    found = win_rate([0.75, 0.25, 0.75, 0.5])

    assert (found.share, found.wins, found.ties, found.losses) == (0.5625, 2, 1, 1)


def test_judge_sees_only_pairs_and_its_answers_go_to_their_prompts() -> None:
    seen: list[tuple[str, str, str]] = []

    def judge(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Sequence[float]:
        seen.extend(zip((each.prompt_id for each in prompts), first, second, strict=True))
        return [1.0, 0.5]

    prompts = [prompt(0), prompt(1), prompt(2)]
    outcomes = outcomes_by_judge(judge, prompts, [sample(0.0), sample(1.0), sample(2.0)], ["x", None, "z"])

    assert outcomes == [1.0, None, 0.5]
    assert seen == [("held-out-0", "0.0", "x"), ("held-out-2", "2.0", "z")]


@pytest.mark.parametrize("answer", [[1.0], [2.0, 0.0], [math.nan, 0.0], None, ["A", "B"]])
def test_judge_that_breaks_its_contract_or_fails_is_an_error_that_says_so(answer: Any) -> None:
    with pytest.raises(RewardError, match="the judge"):
        outcomes_by_judge(lambda *_: answer, [prompt(0), prompt(1)], [sample(), sample()], ["x", "y"])


def test_judge_that_cannot_be_reached_is_named() -> None:
    def judge(*_: object) -> list[float]:
        raise ConnectionError("nobody listens on port 8000")

    with pytest.raises(RewardError, match="ConnectionError: nobody listens on port 8000"):
        outcomes_by_judge(judge, [prompt(0)], [sample()], ["x"])


def test_win_rate_is_asked_of_a_real_endpoint_in_both_orders() -> None:
    with serving(prefers_longer) as served:
        judge = load_comparer(JudgeConfig(url=f"{served.url}/v1", model="wise"))
        samples = [sample(completion="a long answer"), sample(completion="no"), sample(completion="same")]

        outcomes = outcomes_by_judge(judge, [prompt(index) for index in range(3)], samples, ["short", "a long answer", "size"])

    assert outcomes == [1.0, 0.0, 0.5] and len(served.requests) == 6


def test_judge_that_is_not_there_is_refused_before_the_run_begins() -> None:
    words = ["evaluation.winrate=judge", "evaluation.judge.model=wise", f"evaluation.judge.url=http://127.0.0.1:{free_port()}/v1"]

    with pytest.raises(ConfigError, match=r"evaluation\.judge"):
        check_opponent(load_config(overrides=words).config.evaluation, [prompt(0, answer="7")])


# Opponents.


def test_reference_is_the_column_of_that_name_and_else_the_answer() -> None:
    assert expected_of(prompt(0, reference="a summary", answer="7")) == "a summary"
    assert expected_of(prompt(0, answer="7")) == "7" and expected_of(prompt(0)) == ""


def test_win_rate_against_references_that_are_not_there_is_refused_with_a_remedy() -> None:
    config = load_config(overrides=["evaluation.winrate=metric"]).config.evaluation
    check_opponent(config, [prompt(0, answer="7")])

    with pytest.raises(ConfigError, match=r"'held-out-1' has none; name the column"):
        check_opponent(config, [prompt(0, answer="7"), prompt(1)])
    assert references([prompt(0, answer="7")]).name == REFERENCES


def test_opponent_that_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    config = load_config(overrides=["evaluation.winrate=metric", f"evaluation.against={tmp_path / 'nobody'}"]).config

    with pytest.raises(ConfigError, match=r"evaluation\.against .*nobody cannot be asked: .*does not exist"):
        check_opponent(config.evaluation, [prompt(0)])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["evaluation.against=somewhere"], "evaluation.winrate is off"),
        (["evaluation.winrate=judge"], "needs evaluation.judge.url and evaluation.judge.model"),
    ],
)
def test_settings_of_a_win_rate_that_cannot_be_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(overrides=words)


def against(model: Path) -> Config:
    return load_config(overrides=["evaluation.winrate=metric", f"evaluation.against={model}"]).config


def test_opponent_is_asked_once_and_its_completions_stay_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(model: Path, config: Config) -> dict[str, str]:
        asked.append(model.name)
        return {"held-out-1": "seven", "held-out-9": "unasked"}

    monkeypatch.setattr("async_rlhf.opponents.ask_model", ask)
    for model in ("first", "first", "second"):
        sample_opponent(against(tmp_path / model), tmp_path, lambda text: None)

    found = find_opponent(against(tmp_path / "second").evaluation, tmp_path, [prompt(0), prompt(1)])
    assert asked == ["first", "second"]
    assert found is not None and found.completions == (None, "seven"), "by the prompt's id: another tokenizer may leave prompts out"
    assert json.loads((tmp_path / OPPONENTS).read_text())["model"] == str(tmp_path / "second")


def test_opponent_that_answered_other_prompts_altogether_is_refused() -> None:
    with pytest.raises(ConfigError, match="answered other prompts"):
        opponent_of("m", {"train-3": "x"}, [prompt(0)])


def test_opponent_that_cannot_be_sampled_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"exit code 2.*is no folder"):
        ask_model(tmp_path / "nobody", load_config().config)


# Numbers.


def test_numbers_of_an_evaluation_by_hand() -> None:
    """Scores 1, 0, 1 against 0, 0, 0 at the start: +2/3, two better and none worse, p = 2 / 2^2 = 0.5.

    Sampled: 4 and 1 nats over 4 and 6 tokens: 2.5 per completion, 0.5 per token; s = 3 / sqrt(2), error s / sqrt(2) = 1.5.
    """
    asked = ("a", "b", "c")
    start = evaluation(*(sample(0.0, prompt=each) for each in asked))
    after = tuple(
        sample(score, prompt=each, num_tokens=tokens, finish_reason=reason)
        for each, score, tokens, reason in zip(asked, (1.0, 0.0, 1.0), (2, 4, 6), ("stop", "length", "stop"), strict=True)
    )
    drawn = evaluation(sample(1.0, kl_nats=4.0, num_tokens=4), sample(0.0, kl_nats=1.0, num_tokens=6), temperature=1.0)

    row = measure(findings(4, *after, sampled=drawn), start)

    expected = {
        "score": 2 / 3,
        "score_change": 2 / 3,
        "score_change_p": 0.5,
        "length_tokens": 4.0,
        "stopped_share": 2 / 3,
        "cut_share": 1 / 3,
        "sampled_score": 0.5,
        "sampled_length_tokens": 5.0,
        "kl_nats": 2.5,
        "kl_token_nats": 0.5,
        "kl_error_nats": 1.5,
    }
    assert {name: row[f"evaluate/{name}"] for name in expected} == pytest.approx(expected)
    assert (row["evaluate/score_low"], row["evaluate/score_high"]) == wilson_interval(2, 3)
    assert (row["evaluate/kl_nats_low"], row["evaluate/kl_nats_high"]) == pytest.approx((2.5 - 1.5 * 1.959964, 2.5 + 1.5 * 1.959964))
    assert "evaluate/winrate" not in row and "evaluate/reward" not in row


def test_every_number_that_an_evaluation_can_have_is_declared() -> None:
    greedy = sample(0.3, reward=0.1, outcome=0.5)
    row = measure(findings(1, greedy, sampled=evaluation(*[sample(0.1, reward=2.0, kl_nats=1.0, num_tokens=2)] * 2)), evaluation(greedy))

    assert set(row) == {key for key in METRICS if key.startswith("evaluate/")}


def test_pairs_are_found_whatever_the_order_and_equal_prompts_are_paired_once() -> None:
    before = evaluation(sample(0.0, prompt="a"), sample(0.25, prompt="b"), sample(0.5, prompt="a"))
    after = evaluation(sample(1.0, prompt="b"), sample(2.0, prompt="a"), sample(3.0, prompt="c"))

    assert [(old.prompt, old.score, new.score) for old, new in pair_up(before, after)] == [("a", 0.0, 2.0), ("b", 0.25, 1.0)]


def test_evaluation_names_the_versions_that_sampled_it() -> None:
    mixed = findings(40, newest=41, sampled=evaluation(sample(), version=42, oldest=41, temperature=1.0))

    assert mixed.versions == (40, 42) and mixed.title == "versions 40-42"
    assert findings(7).title == "version 7"
    assert evaluation(version=3).versions == (3, 3)


def test_line_on_the_screen_says_what_was_asked_and_what_came_of_it() -> None:
    done = findings(40, sample(1.0, outcome=1.0), sample(0.0, outcome=0.5), newest=42, opponent="references")
    line = headline(done, measure(done, None))

    assert line.startswith("evaluation at version 40 (greedy, 2 held-out problems, versions 40-42): 0.500, 95 % 0.095 to 0.905")
    assert "win-rate against references 0.750 (0.500 to 1.000)" in line
    graded = findings(0, sample(0.25), stage="final")
    assert headline(graded, measure(graded, None)).startswith("final score (greedy, 1 held-out problems, version 0): 0.250")
    failed = findings(0, stage="start", problem="the judge failed: gone")
    assert headline(failed, measure(failed, None)).startswith("start accuracy (greedy, 1 held-out problems, version 0): 0.000")
    assert headline(failed, measure(failed, None)).endswith("no win-rate: the judge failed: gone")


# Files.


def test_evaluations_of_a_folder_are_rows_by_version_one_for_each(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path)
    log.write(findings(0, sample(0.0), stage="start"))
    log.write(findings(4, sample(1.0), newest=5))
    log.write(findings(2, sample(1.0)))

    again = log.write(findings(4, sample(0.5), newest=6))

    rows = read_evaluations(tmp_path)
    assert [(row["stage"], row["version"], row["version_max"]) for row in rows] == [("start", 0, 0), ("between", 2, 2), ("between", 4, 6)]
    assert rows[-1] == again and again["evaluate/score_change"] == 0.5 and "evaluate/score_change" not in rows[0]
    assert set(read_samples(tmp_path)) == {"start", "latest"}
    latest = read_evaluation(tmp_path, "latest")
    assert latest is not None and latest.versions == (4, 6) and latest.accuracy == 0.5


def test_rewinding_takes_back_what_undone_versions_sampled(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.write_evaluation(findings(0, stage="start"))
    recorder.write_evaluation(findings(2))
    recorder.write_evaluation(findings(4, newest=6))

    recorder.cut_after(5)

    recorder.close()
    assert [row["version"] for row in read_evaluations(tmp_path)] == [0, 2]
    assert set(read_samples(tmp_path)) == {"start"}, "the latest one was sampled by version 6, too"


def test_folder_of_a_run_without_evaluations_has_none(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == [] and read_evaluation(tmp_path, "start") is None
    empty = summarize_evaluations(tmp_path, separate_reward=True)
    assert empty == {"gold_start": None, "gold_end": None, "kl_nats": None, "winrate": None, "evaluation": {}}


def test_samples_of_a_run_from_before_there_were_versions_are_read(tmp_path: Path) -> None:
    old = {"version": 0, "temperature": 0.0, "samples": [{"prompt": "1+1=", "completion": "2", "expected": "2", "score": 1.0}]}
    (tmp_path / "samples.json").write_text(json.dumps({"start": old}))

    found = read_evaluation(tmp_path, "start")

    assert found is not None and found.accuracy == 1.0 and found.versions == (0, 0)


def test_summary_has_each_stage_and_the_last_word_as_plain_numbers(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path)
    drawn = evaluation(sample(1.0, kl_nats=3.0, num_tokens=2), sample(0.0, kl_nats=1.0, num_tokens=2), temperature=1.0)
    log.write(findings(0, sample(0.25), stage="start"))
    log.write(findings(2, sample(0.5), newest=3))
    log.write(findings(4, sample(0.75, outcome=1.0), stage="final", sampled=drawn, opponent="references"))

    found: dict[str, Any] = dict(summarize_evaluations(tmp_path, separate_reward=True))

    assert (found["gold_start"], found["gold_end"], found["kl_nats"], found["winrate"]) == (0.25, 0.75, 2.0, 1.0)
    assert set(found["evaluation"]) == {"start", "latest", "final"}
    assert found["evaluation"]["latest"]["versions"] == [2, 3]
    final = found["evaluation"]["final"]
    assert final["score"] == 0.75 and final["score_interval"] == [0.75, 0.75] and final["winrate_interval"] == list(wilson_interval(1, 1))
    assert final["kl_error_nats"] == 1.0 and final["opponent"] == "references" and "problem" not in final
    plain = summarize_evaluations(tmp_path, separate_reward=False)
    assert plain["gold_start"] is None and plain["gold_end"] is None, "the metric itself is trained"

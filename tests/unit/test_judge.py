"""A language model as judge: what it is asked over real HTTP, and how its words become scores."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from async_rlhf.config.rewards import JudgeConfig, RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError, RewardLostError
from async_rlhf.rewards import compare
from async_rlhf.rewards.attempts import TryAgainError
from async_rlhf.rewards.judge import JudgeReward, check_judge, grade_in, verdict_in
from async_rlhf.types import Prompt
from tests.support.http_server import Reply, Request, Served, free_port, serving

pytestmark = pytest.mark.timeout(60)
KEY = "reward.parts.judged"


def prompt_of(text: str = "Say ok.", **columns: Any) -> Prompt:
    return Prompt(prompt_id="p", text=text, token_ids=np.zeros(0, np.int32), columns=columns)


def saying(text: Any) -> Reply:
    return Reply({"choices": [{"message": {"role": "assistant", "content": text}}]})


def question(request: Request) -> str:
    return request.body["messages"][0]["content"]


def section(request: Request, name: str) -> str:
    """What the default rubric shows under `[name]`."""
    found = re.search(rf"\[{name}\]\n(.*?)\n\n\[", question(request), re.DOTALL)
    assert found, question(request)
    return found[1]


def prefers_longer(request: Request) -> Reply:
    first, second = len(section(request, "First answer")), len(section(request, "Second answer"))
    return saying("FIRST" if first > second else "SECOND" if second > first else "TIE")


def part_of(url: str, mode: Any = "pointwise", **changes: Any) -> RewardPartConfig:
    judge = JudgeConfig(url=f"{url}/v1", model="wise", mode=mode, **changes)
    return RewardPartConfig(kind="judge", judge=judge, retries=2, backoff_s=0.01, deadline_s=5.0)


@contextmanager
def judging(answer: Callable[[Request], Reply], mode: str = "pointwise", **changes: Any) -> Iterator[tuple[JudgeReward, Served]]:
    with serving(answer) as served, closing(JudgeReward(KEY, part_of(served.url, mode, **changes))) as reward:
        yield reward, served


# Grades.


def test_a_grade_is_asked_for_at_temperature_0_and_divided_by_the_largest():
    with judging(lambda request: saying(f"{len(section(request, 'Answer'))}"), max_grade=20.0) as (reward, served):
        rating = reward.rate([prompt_of(), prompt_of("Say no.")], ["ok", "nonono"])

    np.testing.assert_allclose(rating.scores, [0.1, 0.3], rtol=1e-6)
    assert {section(request, "Request") for request in served.requests} == {"Say ok.", "Say no."}
    for request in served.requests:
        assert request.path == "/v1/chat/completions"
        assert (request.body["model"], request.body["temperature"], request.body["max_tokens"]) == ("wise", 0.0, 16)
        assert "from 0 (useless or harmful) to 20 " in question(request)


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ("7", 7.0),
        ("Grade: 8/10.", 8.0),
        ("8.5", 8.5),
        ("  10\n", 10.0),
        ("0", 0.0),
        ("**6**, because 2 of 3 parts are right", 6.0),
        ("<think>At first sight 2, no, 3.</think>\n9", 9.0),
        ("I give GPT4-like answers a 5", 5.0),
    ],
)
def test_the_first_number_of_an_answer_is_the_grade(answer: str, grade: float):
    assert grade_in(answer, 10.0) == grade


@pytest.mark.parametrize("answer", ["", "good", "ten", "-3", "11", "1e9", "<think>7", "99999999999999999999"])
def test_an_answer_without_a_grade_in_the_range_is_none(answer: str):
    with pytest.raises(TryAgainError, match="must answer with a number from 0 to 10, got"):
        grade_in(answer, 10.0)


def test_a_judge_that_says_nothing_is_reminded_and_asked_again():
    with judging(lambda request: saying("5" if question(request).endswith("Reply with the number alone.") else "Hm.")) as (reward, served):
        assert reward.rate([prompt_of()], ["ok"]).scores.tolist() == [0.5]

    assert len(served.requests) == 2


@pytest.mark.parametrize("answer", [saying("Well..."), saying(None), saying("")], ids=["words", "none", "empty"])
def test_a_judge_that_never_says_a_grade_fails_that_completion_by_name(answer: Reply):
    with judging(lambda request: answer) as (reward, served), pytest.raises(RewardError) as caught:
        reward.rate([prompt_of()], ["ok"])

    assert len(served.requests) == 3
    assert "must answer with a number" in str(caught.value) and "completion 'ok' of prompt 'Say ok.'" in str(caught.value)


def test_an_answer_that_is_no_chat_completion_is_refused():
    words = r"choices\[0\].message.content, got .*model is loading"
    with judging(lambda request: Reply({"error": "model is loading"})) as (reward, _), pytest.raises(RewardError, match=words):
        reward.rate([prompt_of()], ["ok"])


def test_what_a_completion_says_in_braces_is_not_filled_in():
    with judging(lambda request: saying("5")) as (reward, served):
        reward.rate([prompt_of("{completion}")], ["{prompt} {max_grade} {}"])

    assert section(served.requests[0], "Request") == "{completion}"
    assert section(served.requests[0], "Answer") == "{prompt} {max_grade} {}"


def test_a_chat_prompt_is_shown_as_who_said_what():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say ok."}]
    with judging(lambda request: saying("5")) as (reward, served):
        reward.rate([prompt_of("<|im_start|>...", messages=messages)], ["ok"])

    assert section(served.requests[0], "Request") == "system: Be brief.\n\nuser: Say ok."


def test_a_rubric_of_ones_own_replaces_the_general_one(tmp_path: Path):
    (tmp_path / "rubric.txt").write_text('Is {completion} short? {"as": "JSON"} {prompt}')
    with judging(lambda request: saying("5"), rubric=str(tmp_path / "rubric.txt")) as (reward, served):
        reward.rate([prompt_of()], ["ok"])

    assert question(served.requests[0]) == 'Is ok short? {"as": "JSON"} Say ok.'


# Comparisons.


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("FIRST", 1.0), ("second.", 0.0), ("Tie", 0.5), ("1", 1.0), ("Answer 2 is better", 0.0), ("<think>first?</think>SECOND", 0.0)],
)
def test_the_first_verdict_in_an_answer_counts(answer: str, verdict: float):
    assert verdict_in(answer) == verdict


@pytest.mark.parametrize("answer", ["", "Both are fine", "firstly", "12"])
def test_an_answer_without_a_verdict_is_none(answer: str):
    with pytest.raises(TryAgainError, match="must answer with FIRST, SECOND or TIE"):
        verdict_in(answer)


def test_both_orders_are_asked_and_the_better_completion_wins_in_either_place():
    with serving(prefers_longer) as served:
        verdicts = compare(part_of(served.url).judge, [prompt_of()] * 3, ["long one", "x", "ab"], ["y", "long one", "cd"])

    assert verdicts.tolist() == [1.0, 0.0, 0.5]
    shown = [(section(request, "First answer"), section(request, "Second answer")) for request in served.requests]
    assert len(shown) == 6 and {("long one", "y"), ("y", "long one"), ("ab", "cd"), ("cd", "ab")} <= set(shown)


@pytest.mark.parametrize("place", ["FIRST", "SECOND"])
def test_a_judge_that_prefers_a_place_prefers_nobody(place: str):
    with serving(lambda request: saying(place)) as served:
        assert compare(part_of(served.url).judge, [prompt_of()], ["a"], ["b"]).tolist() == [0.5]


def test_a_completions_score_is_its_share_of_wins_against_its_siblings():
    """Prompt one: lengths 3, 1, 2: wins 2, 0, 1 of 2. Prompt two: lengths 1, 1: a tie of one."""
    one, two = prompt_of(), prompt_of()
    with judging(prefers_longer, "pairwise") as (reward, served):
        scores = reward.rate([one, one, one, two, two], ["aaa", "a", "aa", "b", "c"]).scores

    assert scores.tolist() == [1.0, 0.0, 0.5, 0.5, 0.5] and scores.dtype == np.float32
    assert len(served.requests) == 2 * (3 + 1), "both orders of three pairs and of one"


def test_a_completion_without_siblings_is_neither_better_nor_worse_and_nobody_is_asked():
    """As in an evaluation, which rates one completion of each prompt."""
    with judging(prefers_longer, "pairwise") as (reward, served):
        assert reward.rate([prompt_of(), prompt_of()], ["a", "bb"]).scores.tolist() == [0.5, 0.5]
    assert served.requests == []


# Before a run.


def models(request: Request) -> Reply:
    return Reply({"data": [{"id": "wise"}]}) if request.path == "/v1/models" else Reply(status=404)


def test_a_judge_that_serves_the_model_is_fine():
    with serving(models) as served:
        check_judge(KEY, part_of(served.url).judge)
        assert [request.method for request in served.requests] == ["GET"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "clever"}, r"knows no model 'clever'; it has: wise"),
        ({"model": ""}, r"judged.model must be set"),
        ({"url": ""}, r"judged.url must be set"),
        ({"rubric": "/no/such/file"}, r"rubric /no/such/file cannot be read"),
        ({"url": "http://127.0.0.1:{port}/v1"}, r"does not answer"),
        ({"url": "http://judge.example/v1"}, r"unencrypted to judge.example"),
        ({"token_env": "NO_SUCH_TOKEN"}, r"NO_SUCH_TOKEN \(token_env\) is not set"),
    ],
)
def test_a_judge_that_cannot_work_is_refused_by_name(changes: dict[str, str], words: str):
    with serving(models) as served:
        fields = {"url": f"{served.url}/v1", "model": "wise"} | changes
        with pytest.raises(ConfigError, match=words):
            check_judge(KEY, JudgeConfig(**{**fields, "url": fields["url"].replace("{port}", str(free_port()))}))


@pytest.mark.parametrize(("mode", "missing"), [("pointwise", "completion"), ("pairwise", "first")])
def test_a_rubric_without_a_placeholder_is_refused(tmp_path: Path, mode: Any, missing: str):
    (tmp_path / "rubric.txt").write_text("{prompt} {second}")
    with pytest.raises(ConfigError, match=rf"must hold \{{{missing}\}}"):
        check_judge(KEY, JudgeConfig(url="http://127.0.0.1:9/v1", model="wise", mode=mode, rubric=str(tmp_path / "rubric.txt")))


def test_a_judge_that_is_away_ends_the_run():
    part = part_of(f"http://127.0.0.1:{free_port()}")
    with closing(JudgeReward(KEY, part)) as reward, pytest.raises(RewardLostError, match="cannot connect"):
        reward.rate([prompt_of()], ["a"])

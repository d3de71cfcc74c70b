"""A reward behind HTTP: the protocol on the wire, and every way in which an answer can be wrong. Real HTTP on loopback."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError, RewardLostError
from async_rlhf.rewards import client
from async_rlhf.rewards.attempts import pause_s
from async_rlhf.rewards.http import HttpReward, check_http
from async_rlhf.types import Prompt
from tests.support.http_server import Reply, Request, Served, free_port, serving

pytestmark = pytest.mark.timeout(60)
KEY = "reward.parts.remote"


def prompts_of(num: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"{i}", text=f"{i}+1=", token_ids=np.zeros(0, np.int32), columns={"answer": i + 1}) for i in range(num)]


def lengths(request: Request) -> Reply:
    return Reply({"scores": [len(completion) for completion in request.body["completions"]]})


def settings(url: str, **changes: Any) -> RewardPartConfig:
    return RewardPartConfig(kind="http", url=url, **{"retries": 2, "backoff_s": 0.01, "deadline_s": 5.0, **changes})


@contextmanager
def rewarding(answer: Callable[[Request], Reply], **changes: Any) -> Iterator[tuple[HttpReward, Served]]:
    with serving(answer) as served, closing(HttpReward(KEY, settings(f"{served.url}/score", **changes))) as reward:
        yield reward, served


def refusal(answer: Callable[[Request], Reply], num: int = 1, **changes: Any) -> tuple[str, int]:
    """The message of the RewardError, and how many requests were made."""
    with rewarding(answer, **changes) as (reward, served), pytest.raises(RewardError) as caught:
        reward.rate(prompts_of(num), ["x"] * num)
    return str(caught.value), len(served.requests)


# The protocol.


def test_a_batch_is_one_post_of_prompts_completions_and_columns():
    with rewarding(lengths) as (reward, served):
        rating = reward.rate(prompts_of(2), ["a", "bbb"])

    assert rating.scores.tolist() == [1, 3] and rating.scores.dtype == np.float32
    (request,) = served.requests
    assert (request.method, request.path) == ("POST", "/score")
    assert request.body == {"prompts": ["0+1=", "1+1="], "completions": ["a", "bbb"], "columns": {"answer": [1, 2]}}
    assert "authorization" not in request.headers and request.headers["content-type"] == "application/json"


def test_more_completions_than_a_batch_holds_are_posted_in_several_and_come_back_in_order():
    def slowest_first(request: Request) -> Reply:
        time.sleep(0.2 if "0+1=" in request.body["prompts"] else 0.0)
        return lengths(request)

    with rewarding(slowest_first, batch_size=2) as (reward, served):
        rating = reward.rate(prompts_of(5), ["a", "bb", "ccc", "dddd", "eeeee"])

    assert rating.scores.tolist() == [1, 2, 3, 4, 5]
    assert sorted(len(request.body["prompts"]) for request in served.requests) == [1, 2, 2]


def test_no_more_requests_than_concurrency_are_open_at_once():
    lock, now, most, three = threading.Lock(), 0, 0, threading.Event()

    def counting(request: Request) -> Reply:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if most >= 3:
            three.set()
        three.wait(20)
        three.set()  # if they do not come, nobody else waits for them
        time.sleep(0.03)  # for a fourth
        with lock:
            now -= 1
        return lengths(request)

    with rewarding(counting, batch_size=1, concurrency=3, deadline_s=30.0) as (reward, _):
        reward.rate(prompts_of(12), ["x"] * 12)

    assert most == 3


def test_the_token_of_the_environment_is_sent_and_never_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_REWARD_TOKEN", "s3cret")

    refusing = rewarding(lambda request: Reply({"error": "no"}, status=400), token_env="MY_REWARD_TOKEN")
    with refusing as (reward, served), pytest.raises(RewardError) as caught:
        reward.rate(prompts_of(1), ["x"])

    assert served.requests[0].headers["authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value)


# Failures that pass.


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_an_answer_that_may_pass_is_asked_for_again(status: int):
    count = itertools.count()

    with rewarding(lambda request: lengths(request) if next(count) >= 2 else Reply(status=status)) as (reward, served):
        assert reward.rate(prompts_of(1), ["abc"]).scores.tolist() == [3]

    assert len(served.requests) == 3


def test_waits_between_attempts_double_and_are_jittered(monkeypatch: pytest.MonkeyPatch):
    times: list[float] = []
    pauses: list[float] = []

    def noted(part: RewardPartConfig, attempt: int) -> float:
        pauses.append(pause_s(part, attempt))
        return pauses[-1]

    def failing(request: Request) -> Reply:
        times.append(time.monotonic())
        return Reply(status=500)

    monkeypatch.setattr("async_rlhf.rewards.attempts.pause_s", noted)
    refusal(failing, retries=3, backoff_s=0.08)

    for wait, pause, expected in zip(np.diff(times), pauses, (0.08, 0.16, 0.32), strict=True):
        assert 0.5 * expected <= pause <= 1.5 * expected and wait >= pause


def test_a_service_that_comes_back_in_time_is_waited_for():
    port = free_port()
    reward = HttpReward(KEY, settings(f"http://127.0.0.1:{port}/score", retries=8, backoff_s=0.05))

    def late() -> None:
        time.sleep(0.4)
        with serving(lengths, port):
            come.wait(20)

    come = threading.Event()
    thread = threading.Thread(target=late)
    thread.start()
    try:
        assert reward.rate(prompts_of(1), ["abc"]).scores.tolist() == [3]
    finally:
        come.set()
        thread.join()
        reward.close()


# Failures that stay.


def test_http_500_on_every_attempt_is_an_error_of_the_completion():
    message, attempts = refusal(lambda request: Reply(b"boom <script>", status=500))

    assert attempts == 3
    assert "/score failed 3 time(s) in a row, at last: HTTP 500: 'boom <script>'" in message


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_an_answer_that_blames_the_request_is_not_asked_for_again(status: int):
    message, attempts = refusal(lambda request: Reply({"detail": "why"}, status=status))

    assert attempts == 1
    assert f"answered HTTP {status}" in message and "why" in message


def test_an_unauthorized_request_says_what_to_set():
    assert "token_env must name the environment variable" in refusal(lambda request: Reply(status=401))[0]


def test_a_service_that_is_away_for_longer_than_all_attempts_ends_the_run_by_name():
    url = f"http://127.0.0.1:{free_port()}/score"
    with closing(HttpReward(KEY, settings(url))) as reward, pytest.raises(RewardLostError) as caught:
        reward.rate(prompts_of(1), ["x"])

    assert url in str(caught.value) and "cannot connect" in str(caught.value) and "then resume the run" in str(caught.value)


def test_an_answer_later_than_the_deadline_is_no_answer():
    began = time.monotonic()
    message, _ = refusal(lambda request: time.sleep(1.0) or lengths(request), deadline_s=0.15, retries=1)

    assert "no answer within 0.15 s (deadline_s)" in message
    assert time.monotonic() - began < 5


def test_a_service_that_takes_every_request_and_answers_none_is_lost_after_three_calls(monkeypatch: pytest.MonkeyPatch):
    silent = threading.Event()

    def answer(request: Request) -> Reply:
        silent.wait(20 if "slow" in request.body["completions"] else 0)
        return lengths(request)

    with rewarding(answer, deadline_s=0.1, retries=0) as (reward, served):
        for completion in ("slow", "slow", "fine", "slow", "slow"):
            if completion == "fine":
                with monkeypatch.context() as patch:
                    patch.setattr(reward._client, "_settings", settings(served.url, deadline_s=20.0))
                    reward.rate(prompts_of(1), [completion])
            else:
                with pytest.raises(RewardError, match="no answer within"):
                    reward.rate(prompts_of(1), [completion])
        with pytest.raises(RewardLostError, match="3 calls in a row got no answer"):
            reward.rate(prompts_of(1), ["slow"])
        silent.set()


def test_an_answer_that_drips_for_longer_than_the_deadline_is_no_answer():
    def drip() -> Iterator[bytes]:
        for _ in range(100):
            yield b" "
            time.sleep(0.03)

    message, _ = refusal(lambda request: Reply(chunks=drip()), deadline_s=0.3, retries=0)

    assert "no answer within 0.3 s" in message


def test_an_answer_that_never_ends_is_not_read_to_its_end():
    sent = 0

    def flood() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 1 << 16
            yield b"x" * (1 << 16)

    message, attempts = refusal(lambda request: Reply(chunks=flood()), max_response_mib=1.0)

    assert attempts == 1 and "more than 1 MiB (max_response_mib)" in message
    assert sent < 64 << 20


def test_a_compressed_answer_is_refused_because_its_size_cannot_be_known():
    import gzip

    message, _ = refusal(
        lambda request: Reply(gzip.compress(b" " * (64 << 20)), headers={"Content-Encoding": "gzip"}), max_response_mib=1.0
    )

    assert "answered compressed" in message


@pytest.mark.parametrize("garbage", [b"<html>login</html>", b"", b"\xff\xfe", b"[" * 100_000, b'{"scores": [1'], ids=lambda b: repr(b[:9]))
def test_an_answer_that_is_no_json_is_refused(garbage: bytes):
    message, attempts = refusal(lambda request: Reply(garbage))

    assert attempts == 1 and "must answer JSON, got" in message and len(message) < 800


@pytest.mark.parametrize("answer", [[1.0], {"score": [1.0]}, 3, None, "1.0"], ids=repr)
def test_json_of_another_form_is_refused(answer: Any):
    assert 'must answer {"scores": [...]}' in refusal(lambda request: Reply(answer))[0]


@pytest.mark.parametrize("scores", [[], [1.0, 2.0]], ids=repr)
def test_a_wrong_count_is_refused(scores: list[float]):
    message, _ = refusal(lambda request: Reply({"scores": scores}))

    assert f"expected 1, got {len(scores)}" in message and "completion 'x' of prompt '0+1='" in message


@pytest.mark.parametrize("score", ["NaN", "Infinity", "-Infinity", "1e39", "null", '"1"', "[1]", "{}"])
def test_a_score_that_is_no_finite_number_is_refused_with_its_completion(score: str):
    message, _ = refusal(lambda request: Reply(f'{{"scores": [{score}]}}'.encode()))

    assert "must return finite numbers, got" in message and "completion 'x' of prompt '0+1='" in message


def test_a_redirect_is_not_followed_and_gets_no_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_REWARD_TOKEN", "s3cret")
    with serving(lengths) as elsewhere:
        message, attempts = refusal(
            lambda request: Reply(status=307, headers={"Location": f"{elsewhere.url}/score"}), token_env="MY_REWARD_TOKEN"
        )

    assert attempts == 1 and not elsewhere.requests
    assert "a redirect to" in message and elsewhere.url in message


def test_the_first_failing_batch_ends_the_others():
    def failing(request: Request) -> Reply:
        if "3+1=" in request.body["prompts"]:
            return Reply(status=400)
        time.sleep(0.05)
        return lengths(request)

    _, attempts = refusal(failing, num=40, batch_size=1, concurrency=4)

    assert attempts < 20


# Before a run.


def test_an_address_that_answers_an_empty_batch_is_fine():
    with serving(lengths) as served:
        check_http(KEY, settings(f"{served.url}/score"))
        assert served.requests[0].body == {"prompts": [], "completions": [], "columns": {}}


def test_a_service_that_only_fails_on_the_empty_batch_may_still_be_right():
    with serving(lambda request: Reply(status=500)) as served:
        check_http(KEY, settings(f"{served.url}/score"))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Reply(status=404), "HTTP 404.*is that the right address"),
        (Reply(status=401), "HTTP 401.*token_env"),
        (Reply(status=302, headers={"Location": "http://elsewhere/"}), "HTTP 302"),
        (Reply({"score": []}), r'must answer \{"scores": \[\]\} to an empty batch'),
    ],
)
def test_an_address_that_is_certain_to_be_wrong_is_refused(answer: Reply, words: str):
    with serving(lambda request: answer) as served, pytest.raises(ConfigError, match=rf"reward.parts.remote.url: .*{words}"):
        check_http(KEY, settings(f"{served.url}/score"))


def test_an_address_where_nobody_listens_is_refused():
    with pytest.raises(ConfigError, match=r"reward.parts.remote.url: http://127.0.0.1:\d+/ does not answer .*start the service first"):
        check_http(KEY, settings(f"http://127.0.0.1:{free_port()}/"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "must say where batches are posted"),
        ("127.0.0.1:8000", "must be an http:// or https:// address"),
        ("ftp://127.0.0.1/", "must be an http:// or https:// address"),
        ("http://127.0.0.1:x/", "is no address"),
        ("http://me:word@127.0.0.1/", "holds a user name or password"),
        ("http://reward.example/", "unencrypted to reward.example; use https://, or set allow_plain_http"),
        ("http://127.0.0.1.evil.example/", "unencrypted"),
        ("http://10.0.0.1/", "unencrypted"),
    ],
)
def test_an_address_that_may_not_be_asked_is_refused_without_asking(url: str, words: str):
    with pytest.raises(ConfigError, match=words):
        check_http(KEY, settings(url))
    if url:
        with pytest.raises(ConfigError, match=words):
            HttpReward(KEY, settings(url))


def test_a_token_that_is_not_there_is_missed_before_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MY_REWARD_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"environment variable MY_REWARD_TOKEN \(token_env\) is not set"):
        check_http(KEY, settings("http://127.0.0.1:9/", token_env="MY_REWARD_TOKEN"))


def test_plain_http_to_this_machine_and_https_to_any_are_allowed():
    for url in ("http://127.0.0.1:9/", "http://localhost:9/", "http://[::1]:9/", "https://reward.example/"):
        HttpReward(KEY, settings(url)).close()
    HttpReward(KEY, settings("http://10.0.0.1/", allow_plain_http=True)).close()


def test_text_that_no_console_could_show_travels_unharmed():
    words = ["\u00fc\U0001f600", "\n\t\x00", '"\\']
    with rewarding(lengths) as (reward, served):
        reward.rate(prompts_of(3), words)

    assert served.requests[0].body["completions"] == words
    assert json.loads(json.dumps(words)) == words


@pytest.mark.parametrize(("pause_s", "chunk"), [(0.0, b"x" * (1 << 20)), (0.05, b"x")], ids=["flood", "drip"])
def test_an_answer_without_end_holds_up_no_start(pause_s: float, chunk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PROBE_S", 1.5)
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1000:
            sent += 1
            time.sleep(pause_s)
            yield chunk

    with serving(lambda request: Reply(chunks=chunks())) as served:
        address = client.Address(key="reward.parts.it.url", url=served.url, token_env="", allow_plain_http=False)

        assert client.probe(address, "GET", served.url) is None
    assert sent < 100

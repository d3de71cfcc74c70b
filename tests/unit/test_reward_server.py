"""serve-reward: the protocol from the other side, tokens, sizes, and what it refuses to start with. Real HTTP on loopback."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from rich.console import Console

from async_rlhf.commands.serve_reward import TOKEN_VARIABLE, Place, run_serve_reward
from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError, RewardLostError
from async_rlhf.rewards.base import Rating
from async_rlhf.rewards.http import HttpReward, check_http
from async_rlhf.rewards.server import Guard, make_app
from async_rlhf.types import Prompt

pytestmark = pytest.mark.timeout(60)
MAX_BYTES = 4096


class Lengths:
    """A reward that fails on words that say so, and is busy as long as it is held."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.prompts: list[Prompt] = []
        self.at_once = 0

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
        self.at_once += 1
        assert self.at_once == 1, "one caller at a time"
        try:
            assert self.free.wait(20)
            self.prompts = list(prompts)
            if "bad" in completions:
                raise RewardError("the reward says: bad")
            if "gone" in completions:
                raise RewardLostError("the judge is away")
            return Rating(scores=np.float32([len(completion) for completion in completions]))
        finally:
            self.at_once -= 1

    def close(self) -> None: ...


@contextmanager
def served(reward: Lengths, token: str = "") -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Guard(make_app(reward, "lengths"), token, MAX_BYTES), log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    ends = time.monotonic() + 10
    while not server.started and time.monotonic() < ends:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def reward() -> Lengths:
    return Lengths()


@pytest.fixture(scope="module")
def url(reward: Lengths) -> Iterator[str]:
    with served(reward) as url:
        yield url


def post(url: str, body: Any, **changes: Any) -> httpx.Response:
    return httpx.post(f"{url}/score", json=body, trust_env=False, **changes)


def batch(*completions: str) -> dict[str, Any]:
    return {"prompts": ["p"] * len(completions), "completions": list(completions), "columns": {}}


def prompt_of(text: str, **columns: Any) -> Prompt:
    return Prompt(prompt_id="p", text=text, token_ids=np.zeros(0, np.int32), columns=columns)


def test_the_client_of_a_run_and_the_server_speak_the_same_protocol(url: str, reward: Lengths):
    settings = RewardPartConfig(kind="http", url=f"{url}/score", batch_size=2)
    check_http("reward.parts.x", settings)
    client = HttpReward("reward.parts.x", settings)
    try:
        rating = client.rate([prompt_of("p", answer={"a": [1, None]}), prompt_of("q", answer="\u00fc")] * 2, ["a", "bb", "ccc", ""])
    finally:
        client.close()

    assert rating.scores.tolist() == [1, 2, 3, 0]
    assert [(prompt.text, prompt.columns) for prompt in reward.prompts] == [
        ("p", {"answer": {"a": [1, None]}}),
        ("q", {"answer": "\u00fc"}),
    ]


def test_neighbours_of_one_prompt_are_siblings(url: str, reward: Lengths):
    post(url, {"prompts": ["p", "p", "q", "p"], "completions": ["a"] * 4, "columns": {"row": [1, 1, 1, 1]}})

    one, two, three, four = reward.prompts
    assert one is two and len({id(one), id(three), id(four)}) == 3


@pytest.mark.parametrize(
    "body",
    [
        {"prompts": ["p"]},
        {"prompts": ["p"], "completions": []},
        {"prompts": ["p"], "completions": ["a", "b"]},
        {"prompts": ["p"], "completions": [3]},
        {"prompts": ["p"], "completions": [None]},
        {"prompts": "p", "completions": "c"},
        {"prompts": ["p"], "completions": ["a"], "columns": {"answer": []}},
        {"prompts": ["p"], "completions": ["a"], "columns": [1]},
        {"prompts": ["p"], "completions": ["a"], "colums": {}},
        [],
        None,
    ],
    ids=json.dumps,
)
def test_a_request_of_another_form_is_refused(url: str, body: Any):
    assert post(url, body).status_code == 422


def test_bytes_that_are_no_json_are_refused(url: str):
    headers = {"Content-Type": "application/json"}
    assert httpx.post(f"{url}/score", content=b"{\xff", headers=headers, trust_env=False).status_code in (400, 422)


@pytest.mark.parametrize(("word", "status", "detail"), [("bad", 500, "the reward says: bad"), ("gone", 503, "the judge is away")])
def test_a_reward_that_fails_says_so(url: str, word: str, status: int, detail: str):
    answer = post(url, batch("a", word))

    assert (answer.status_code, answer.json()) == (status, {"detail": detail})


def test_health_answers_while_a_batch_is_scored(url: str, reward: Lengths):
    reward.free.clear()
    threads = [threading.Thread(target=post, args=(url, batch("a"))) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert httpx.get(f"{url}/health", trust_env=False, timeout=5).json() == {"status": "ok", "reward": "lengths"}
    finally:
        reward.free.set()
        for thread in threads:
            thread.join()


def test_the_protocol_is_described_as_openapi_and_no_page_loads_scripts(url: str):
    description = httpx.get(f"{url}/openapi.json", trust_env=False).json()

    assert set(description["paths"]) == {"/score", "/health"}
    assert set(description["components"]["schemas"]["ScoreRequest"]["properties"]) == {"prompts", "completions", "columns"}
    assert {httpx.get(f"{url}/{page}", trust_env=False).status_code for page in ("docs", "redoc")} == {404}


def test_a_request_larger_than_allowed_is_not_read(url: str):
    large = batch("x" * MAX_BYTES)

    assert post(url, large).status_code == 413
    chunked = httpx.post(f"{url}/score", content=iter([b"x" * 1024] * 8), trust_env=False)
    assert chunked.status_code == 413 and "send smaller batches" in chunked.text


def test_a_page_that_was_led_here_under_another_name_gets_no_answer(url: str):
    assert post(url, batch("a"), headers={"Host": "evil.example"}).status_code == 403
    assert post(url, batch("a"), headers={"Host": "127.0.0.1.evil.example:80"}).status_code == 403
    assert post(url, batch("a"), headers={"Host": "localhost:1"}).status_code == 200


def test_with_a_token_only_who_knows_it_is_answered():
    with served(Lengths(), "s3cret") as url:
        assert [post(url, batch("a"), headers={"Authorization": value}).status_code for value in ("", "Bearer s3cre", "s3cret")] == [
            401
        ] * 3
        assert httpx.get(f"{url}/openapi.json", trust_env=False).status_code == 401
        answer = post(url, batch("a"), headers={"Authorization": "Bearer s3cret", "Host": "reward.example"})
        assert answer.json() == {"scores": [1.0]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs one thing to serve"),
        ({"function": "async_rlhf.tasks.arithmetic:score", "model": Path("/m")}, "needs one thing to serve"),
        ({"function": "no.such.module:score"}, "does not import"),
        ({"model": Path("/no/such/model")}, "holds no config.json"),
        ({"words": ["no/such.yaml"]}, "config file not found"),
        ({"function": "async_rlhf.tasks.arithmetic:score", "place": Place(host="0.0.0.0")}, f"reached by others: set {TOKEN_VARIABLE}"),
        ({"function": "async_rlhf.tasks.arithmetic:score", "place": Place(host="no.such.host.invalid")}, f"set {TOKEN_VARIABLE}"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(arguments: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    given = {"words": [], "function": "", "model": None, "place": Place(), **arguments}

    with pytest.raises(ConfigError, match=words):
        run_serve_reward(given["words"], given["function"], given["model"], given["place"], Console())


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1 port"):
        run_serve_reward([], "async_rlhf.tasks.arithmetic:score", None, Place(port=taken.getsockname()[1]), Console())

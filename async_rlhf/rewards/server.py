"""Any reward behind HTTP, by the protocol of `http`: POST /score, GET /health, GET /openapi.json."""

import hmac
import json
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from async_rlhf import __version__
from async_rlhf.errors import RewardError, RewardLostError
from async_rlhf.rewards.base import Reward
from async_rlhf.rewards.client import is_loopback
from async_rlhf.types import Prompt

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BATCH = 65536
"""Completions in one request."""

Text = Annotated[str, Field(strict=True)]


class ScoreRequest(BaseModel):
    """A batch: one prompt per completion; each column holds one value per completion, too."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[Text] = Field(max_length=MAX_BATCH)
    completions: list[Text] = Field(max_length=MAX_BATCH)
    columns: dict[str, list[Any]] = Field(default_factory=dict)


class ScoreAnswer(BaseModel):
    """One finite score per completion, in their order."""

    scores: list[float]


class Health(BaseModel):
    """The server answers, and what it serves."""

    status: str
    reward: str


def make_app(reward: Reward, name: str) -> FastAPI:
    """The routes around a reward, which is asked one batch at a time.

    Args:
        name: what is served, for /health.
    """
    # The interactive pages would load scripts from elsewhere.
    app = FastAPI(title="async-rlhf reward", version=__version__, docs_url=None, redoc_url=None)
    one_at_a_time = threading.Lock()

    @app.post("/score")
    def score(batch: ScoreRequest) -> ScoreAnswer:  # pyright: ignore[reportUnusedFunction]  # the route is the use
        """Score a batch; an empty one is answered by no scores."""
        lengths = {"completions": len(batch.completions), **{f"columns.{name}": len(values) for name, values in batch.columns.items()}}
        for what, length in lengths.items():
            if length != len(batch.prompts):
                raise HTTPException(422, f"{what} must be as many as the {len(batch.prompts)} prompts, got {length}")
        prompts = _prompts(batch)
        try:
            with one_at_a_time:
                return ScoreAnswer(scores=reward.rate(prompts, batch.completions).scores.tolist())
        except RewardError as error:
            raise HTTPException(500, str(error)) from error
        except RewardLostError as error:
            raise HTTPException(503, str(error)) from error

    @app.get("/health")
    async def health() -> Health:  # pyright: ignore[reportUnusedFunction]
        """Answers at once, whatever is being scored."""
        return Health(status="ok", reward=name)

    return app


def _prompts(batch: ScoreRequest) -> list[Prompt]:
    """Neighbours of the same prompt and columns share one Prompt, as siblings do."""
    prompts: list[Prompt] = []
    for index, text in enumerate(batch.prompts):
        columns = {name: values[index] for name, values in batch.columns.items()}
        if prompts and prompts[-1].text == text and prompts[-1].columns == columns:
            prompts.append(prompts[-1])
        else:
            prompts.append(Prompt(prompt_id=str(index), text=text, token_ids=np.zeros(0, np.int32), columns=columns))
    return prompts


@dataclass(frozen=True)
class Guard:
    """Stands before an app: asks for the token, and reads no more than `max_bytes` of a request.

    Without a token only this machine's own names are answered to: a web page that was led here under a name of its own is not.
    """

    app: Any
    token: str
    max_bytes: int

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        length = headers.get("content-length", b"0")
        if self.token and not hmac.compare_digest(headers.get("authorization", b""), f"Bearer {self.token}".encode()):
            return await _refuse(send, 401, "the header `Authorization: Bearer TOKEN` is missing or wrong")
        if not self.token and not is_loopback(host_name(headers.get("host", b"").decode("latin-1"))):
            return await _refuse(send, 403, "this server answers to localhost and 127.0.0.1 alone")
        if not length.isdigit() or int(length) > self.max_bytes:
            return await _refuse(send, 413, self._too_large)
        body = await self._body(receive)
        if body is None:
            return await _refuse(send, 413, self._too_large)
        given = False

        async def whole() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, whole, send)

    @property
    def _too_large(self) -> str:
        return f"a request may have {self.max_bytes} bytes at most; send smaller batches"

    async def _body(self, receive: Receive) -> bytes | None:
        """All of the request's body, or None where it is too large or its sender has gone."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                return None
            if not message.get("more_body"):
                return bytes(body)


def host_name(host: str) -> str:
    """`127.0.0.1:80` -> `127.0.0.1`, `[::1]:80` -> `::1`."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""Messages made up for tests: groups with random tokens, versions and scores; and when two messages are the same bit for bit."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from async_rlhf.types import FinishReason, Prompt, Rollout, RolloutGroup, ScoredGroup, Ticket, VersionSpan


def make_ticket(ticket_id: int = 0, *, deadline: int = 1, attempt: int = 0, holder: str = "generator-0.0", seed: int = 0) -> Ticket:
    """A ticket for a five-token prompt."""
    prompt = Prompt(prompt_id=f"p{ticket_id}", text="1+1=", token_ids=np.array([4, 5, 6, 7, 8], dtype=np.int32), columns={"answer": "2"})
    return Ticket(ticket_id=ticket_id, prompt=prompt, epoch=0, seed=seed, deadline=deadline, attempt=attempt, holder=holder)


def make_rollout(rng: np.random.Generator, *, version: int = 0, max_tokens: int = 8, vocab_size: int = 20) -> Rollout:
    """A completion of 1 to `max_tokens` random tokens, all sampled by `version`."""
    length = int(rng.integers(1, max_tokens + 1))
    return Rollout(
        completion_ids=rng.integers(3, vocab_size, size=length, dtype=np.int32),
        behavior_logprobs=-rng.random(length, dtype=np.float32) * 3,
        version_spans=(VersionSpan(version=version, start=0, end=length),),
        finish_reason=FinishReason.STOP,
    )


def make_scored(
    ticket: Ticket, *, scores: Sequence[float] = (1.0, 0.0), version: int = 0, seed: int = 0, max_tokens: int = 8
) -> ScoredGroup:
    """A scored group with one completion per score."""
    rng = np.random.default_rng([seed, ticket.ticket_id])
    rollouts = tuple(make_rollout(rng, version=version, max_tokens=max_tokens) for _ in scores)
    return ScoredGroup(
        group=RolloutGroup(ticket=ticket, rollouts=rollouts),
        scores=np.asarray(scores, dtype=np.float32),
        reference_logprobs=tuple(-rng.random(len(r.completion_ids), dtype=np.float32) * 3 for r in rollouts),
        completions=tuple("2" for _ in scores),
        reward_parts={"length": rng.random(len(scores), dtype=np.float32)},
    )


def plain(value: Any) -> Any:
    """Equal for two messages exactly when they are of the same types and, arrays, of the same bits."""
    if dataclasses.is_dataclass(value):
        return type(value), {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return (type(value), [plain(each) for each in value]) if isinstance(value, tuple | list) else (type(value), value)

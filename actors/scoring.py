"""What happens to groups between their generator and the queue: rated by reward actors if there are any, scored, put."""

import asyncio
from collections.abc import Sequence
from typing import Any

from actors.crew import Crew
from actors.meters import Meter
from actors.replay_queue import ScoringFailed, WithScorer
from actors.supervision import LOST, Member
from async_rlhf.config import Config
from async_rlhf.errors import ActorFailedError, DeadlineError, ObjectLostError, RewardError
from async_rlhf.types import Ticket


async def score(tickets: Sequence[Ticket], groups_ref: Any, crew: Crew, config: Config) -> None:
    """Have sampled groups scored and put: all at once, and when that fails one by one, so that only the guilty one suffers."""
    await crew.note(WithScorer(tickets=tuple(tickets)), config)
    if not await _try_score(groups_ref, None, crew, config):
        crew.meters.score.through(len(tickets))
        return
    for index, ticket in enumerate(tickets):
        reason = await _try_score(groups_ref, index, crew, config)
        crew.meters.score.through(0 if reason else 1)
        if reason:
            await crew.note(ScoringFailed(tickets=(ticket,), reason=reason), config)


async def _try_score(groups_ref: Any, only: int | None, crew: Crew, config: Config) -> str:
    """Rate, score and put all groups, or the one of that index; returns why that failed, or nothing."""
    limit = config.timeouts.score_s
    rating: tuple[Any, ...] = ()
    if crew.rewards:
        rated, why = await _by_one_of(crew.idle_rewards, crew.meters.reward, "rate", (groups_ref, only), limit)
        if why:
            return why
        rating = (rated,)
    scored_ref, why = await _by_one_of(crew.idle_scorers, crew.meters.score, "score", (groups_ref, only, *rating), limit)
    if why:
        return why
    try:
        await crew.queue.call("put", scored_ref, timeout_s=config.timeouts.call_s)
    except ObjectLostError as error:
        return str(error)
    return ""


async def _by_one_of(idle: "asyncio.Queue[Member]", meter: Meter, method: str, args: Sequence[Any], limit_s: float) -> tuple[Any, str]:
    """Have the first idle member do it: the reference of what it made, or why there is none.

    Raises:
        RewardLostError: nobody could; no group is to blame. RestartLimitError: the members keep dying.
    """
    member = await idle.get()
    actor = member.actor
    try:
        with meter.working():
            return await actor.fetch(method, *args, timeout_s=limit_s), ""
    except LOST as error:
        await member.replace(actor, error)
        if isinstance(error, DeadlineError):
            return None, f"no score within {limit_s:g} s"
        return None, f"the {member.name.partition('-')[0]} died: {error}"
    except (RewardError, ActorFailedError, ObjectLostError) as error:
        return None, str(error)
    finally:
        idle.put_nowait(member)

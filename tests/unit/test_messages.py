"""Every message and every error survives a process border. New ones are found by walking the modules."""

import dataclasses
import enum
import inspect
import pickle
from collections.abc import Mapping
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from actors import engine_loop, generator, remote, replay_queue, weight_broadcaster
from async_rlhf import errors, events, tickets, types
from async_rlhf.journal_frames import Mark, Position
from async_rlhf.metrics import BatchSummary
from async_rlhf.prompts import PromptCursor
from async_rlhf.scores import ScoreMoments
from async_rlhf.state import TrainingState


def classes_of(module: ModuleType) -> list[type]:
    return [item for item in vars(module).values() if inspect.isclass(item) and item.__module__ == module.__name__]


WALKED = (types, tickets, events, replay_queue, weight_broadcaster, engine_loop, generator, remote)
MESSAGES = [item for module in WALKED for item in classes_of(module) if dataclasses.is_dataclass(item) and item.__name__[0] != "_"]
MESSAGES += [BatchSummary, ScoreMoments, PromptCursor, Mark, Position, TrainingState]
MEMBERS = [member for module in (types, tickets) for item in classes_of(module) if issubclass(item, enum.Enum) for member in item]
ERRORS = classes_of(errors)


def example(hint: Any, count: int = 0) -> Any:
    """A value of the annotated type; numbers differ from each other so that a swap of two fields shows."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{item.name: example(hints[item.name], count + i + 1) for i, item in enumerate(dataclasses.fields(hint))})
    if origin is Literal or (inspect.isclass(hint) and issubclass(hint, enum.Enum)):
        return next(iter(arguments or hint))
    if origin is tuple:
        return tuple(example(arguments[0], count + i) for i in range(2))
    if origin is list:
        return [example(arguments[0], count)]
    if origin in (Mapping, dict):
        return {example(arguments[0], count): example(arguments[1], count)}
    if origin in (Union, UnionType):
        return example(arguments[0], count)
    simple = {
        int: count,
        float: count + 0.5,
        str: f"text {count}",
        bool: True,
        Any: None,
        np.ndarray: np.arange(count, count + 3, dtype=np.float32),
    }
    assert hint in simple, f"no example for {hint!r}: teach it to test_messages.example"
    return simple[hint]


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if dataclasses.is_dataclass(left):
        for item in dataclasses.fields(left):
            assert_same(getattr(left, item.name), getattr(right, item.name))
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    elif isinstance(left, tuple | list):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    else:
        assert left == right


def test_walk_finds_the_messages_and_the_errors() -> None:
    names = {item.__name__ for item in MESSAGES + ERRORS}
    assert {"Prompt", "Ticket", "ScoredGroup", "WeightsVersion", "QueueCounters", "ConfigError", "ActorLostError"} <= names
    assert {"Granted", "Annulled", "NextBatch", "Booked", "ScoringFailed", "Published", "Offer", "Collected", "Process"} <= names
    assert {"ObjectLostError", "LearnerLostError", "RestartLimitError", "JournalError", "JournalLockedError"} <= names


def test_every_event_and_every_fact_is_among_the_messages() -> None:
    assert {*get_args(events.Event), *get_args(replay_queue.Fact)} <= set(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_message_survives_pickling_field_by_field(message: type) -> None:
    original = example(message)
    assert_same(pickle.loads(pickle.dumps(original)), original)


@pytest.mark.parametrize("message", MESSAGES)
def test_message_cannot_be_changed_and_takes_its_fields_by_name_only(message: type) -> None:
    original = example(message)
    first = dataclasses.fields(original)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(original, first, getattr(original, first))
    with pytest.raises(TypeError):
        message(*(getattr(original, item.name) for item in dataclasses.fields(original)))
    assert not hasattr(original, "__dict__"), "messages have slots"


@pytest.mark.parametrize("member", MEMBERS)
def test_enum_member_survives_pickling_as_itself(member: enum.Enum) -> None:
    assert pickle.loads(pickle.dumps(member)) is member


@pytest.mark.parametrize("error", ERRORS)
def test_error_survives_pickling_with_its_type_and_message(error: type[Exception]) -> None:
    try:
        raise error("batch_groups must be >= 1, got 0; set it to 1")
    except errors.AsyncRLHFError as caught:
        copy = pickle.loads(pickle.dumps(caught))
    assert type(copy) is error
    assert str(copy) == "batch_groups must be >= 1, got 0; set it to 1"


@pytest.mark.parametrize("error", ERRORS)
def test_error_belongs_to_the_tree_and_has_no_constructor_of_its_own(error: type[Exception]) -> None:
    assert issubclass(error, errors.AsyncRLHFError)
    assert "__init__" not in vars(error)
    assert error.__name__ in (errors.__doc__ or "")


# What the messages derive


def span(version: int, start: int, end: int) -> types.VersionSpan:
    return types.VersionSpan(version=version, start=start, end=end)


def make_rollout(*spans: types.VersionSpan) -> types.Rollout:
    length = spans[-1].end
    return types.Rollout(
        completion_ids=np.arange(length, dtype=np.int32),
        behavior_logprobs=np.zeros(length, dtype=np.float32),
        version_spans=spans,
        finish_reason=types.FinishReason.STOP,
    )


def make_scored(scores: list[float], *rollouts: types.Rollout) -> types.ScoredGroup:
    return types.ScoredGroup(
        group=types.RolloutGroup(ticket=example(types.Ticket), rollouts=rollouts),
        scores=np.array(scores, dtype=np.float32),
        reference_logprobs=tuple(rollout.behavior_logprobs for rollout in rollouts),
        completions=("",) * len(rollouts),
    )


def test_one_old_token_decides_the_age_of_its_whole_group() -> None:
    young, mixed = make_rollout(span(4, 0, 3)), make_rollout(span(2, 0, 1), span(4, 1, 5))
    batch = types.Batch(update=5, groups=(make_scored([0, 1], young, mixed), make_scored([0, 1], young, young)))
    assert batch.staleness == (3, 1)
    assert batch.groups[0].group.num_tokens == 3 + 5


@pytest.mark.parametrize(("scores", "tied"), [([0.5, 0.5, 0.5], True), ([0.5, 0.5], True), ([0.5, 0.5, 0.25], False), ([1.0], False)])
def test_group_is_tied_when_it_has_several_scores_and_all_are_equal(scores: list[float], tied: bool) -> None:
    assert make_scored(scores, *[make_rollout(span(0, 0, 1))] * len(scores)).tied is tied

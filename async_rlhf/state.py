"""TrainingState: where a run stands, in one frozen object."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from async_rlhf.errors import ConfigError
from async_rlhf.scores import ScoreMoments, moments_from_json

STATE_FILE, STATE_ACTOR_FILE = "state.json", "state_actor"
"""In the run folder: the durable state, and the name of the living TrainingState actor in the run's namespace."""

LIVE_PHASES = ("starting", "training", "evaluating")
"""Phases of a run whose driver is at work, or was killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Written at each update by its single writer, the TrainingState actor; read by everyone."""

    run_id: str
    phase: str
    """starting, training, evaluating, finished, failed or interrupted."""
    version: int
    """Completed updates."""
    num_updates: int
    """Updates that the run will make."""
    optimizer_steps: int
    """Taken since version 0."""
    prompts: int
    """Prompts trained."""
    completions: int
    """Completions trained, all K of each prompt."""
    tokens: int
    """Completion tokens of these."""
    seed: int
    reward_mean: float | None = None
    """Of the last batch; None before the first."""
    best_reward_mean: float | None = None
    staleness_max: int = 0
    """The largest staleness trained so far, updates."""
    weights_version: int = 0
    """The newest version with the broadcaster."""
    queue: Mapping[str, int] = field(default_factory=dict[str, int])
    """Groups by place: leased, scoring, waiting, taken, trained."""
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    """Reason -> groups that are not trained, or were refused, so far."""
    elapsed_s: float = 0.0
    """From the first ticket on, over all drivers of the run."""
    session: int = 0
    """Drivers that the run had before this one."""
    restarts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Part of the crew -> how often this driver had to start it again."""
    checkpoint: int | None = None
    """Version of the newest checkpoint; None: there is none yet."""
    score_moments: ScoreMoments = field(default_factory=ScoreMoments)
    """What shapes the scores of the batches to come; see scores.py."""
    actors: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name -> what it last did."""
    updated_at: float = 0.0
    """Unix seconds."""

    def to_json(self) -> str:
        """The durable form."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)


def state_from_json(text: str) -> TrainingState:
    """The state that to_json wrote.

    Raises:
        ValueError, TypeError, AttributeError: it wrote nothing like this.
    """
    fields: dict[str, Any] = json.loads(text)
    moments: Any = moments_from_json(fields.get("score_moments", {}))
    state = TrainingState(**{**fields, "score_moments": moments})
    for name, hint in get_type_hints(TrainingState).items():
        if not isinstance(getattr(state, name), _kinds(hint)):
            raise TypeError(f"{name} must be {hint}, got {getattr(state, name)!r}")
    return state


def _kinds(hint: Any) -> tuple[type, ...]:
    """The classes of the values that a field may have; JSON writes a whole number without its point."""
    if isinstance(hint, UnionType):
        return tuple(kind for option in get_args(hint) for kind in _kinds(option))
    return (float, int) if hint is float else (get_origin(hint) or hint,)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader, or a crash, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_state(run_folder: Path) -> TrainingState:
    """The durable state of a run folder.

    Raises:
        ConfigError: the folder holds none, or a damaged one.
    """
    file = run_folder / STATE_FILE
    if not file.is_file():
        raise ConfigError(f"{run_folder} is no run folder: it has no state.json; give the folder that `train` printed")
    try:
        return state_from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; put a copy back, such as that of the newest checkpoint") from None

"""Whom a win-rate compares with: the references of the prompts, or another model's greedy completions."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from async_rlhf.config import Config, to_yaml
from async_rlhf.config.prompts import EvaluationConfig
from async_rlhf.config.rewards import RewardConfig
from async_rlhf.errors import ConfigError, RewardError, RunError
from async_rlhf.evaluation import Sample, expected_of
from async_rlhf.rewards.functions import zeros
from async_rlhf.state import write_atomically
from async_rlhf.types import JsonValue, Prompt
from async_rlhf.winrate import LOSS, WIN, Comparer, by_score

REFERENCES = "references"
OPPONENTS = "opponents.json"
"""In the run folder: the completions of `evaluation.against`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opponent:
    """Who is compared with, and what it answered."""

    name: str
    """`references`, or a model folder."""
    completions: tuple[str | None, ...]
    """One per held-out prompt, in their order; None: it was not asked this one (its tokenizer makes the prompt too long)."""


def references(prompts: Sequence[Prompt]) -> Opponent:
    """The references of the prompts as the opponent.

    Raises:
        ConfigError: a prompt has none.
    """
    for prompt in prompts:
        if not expected_of(prompt):
            raise ConfigError(
                f"a win-rate against references needs one for every held-out prompt, but {prompt.prompt_id!r} has none; name the column "
                "that holds them (completion_column), give a model to compare with (evaluation.against), or set evaluation.winrate=off"
            )
    return Opponent(name=REFERENCES, completions=tuple(expected_of(prompt) for prompt in prompts))


def with_absolute_paths(config: Config) -> Config:
    """The same opponent, and the same judge's rubric, for whoever reads the config in another folder."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if path else ""

    of = config.evaluation
    judge = replace(of.judge, rubric=absolute(of.judge.rubric))
    return replace(config, evaluation=replace(of, against=absolute(of.against), judge=judge))


def check_opponent(config: EvaluationConfig, prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError unless everything is there that the win-rate asked for needs."""
    from async_rlhf.model_folders import check_model_folder
    from async_rlhf.rewards.judge import check_judge

    if config.winrate == "off":
        return
    if config.winrate == "judge":
        check_judge("evaluation.judge", replace(config.judge, mode="pairwise"))
    if config.against:
        try:
            check_model_folder(Path(config.against))
        except ConfigError as error:
            raise ConfigError(f"evaluation.against {config.against} cannot be asked: {error}") from None
    else:
        references(prompts)


def find_opponent(config: EvaluationConfig, run_folder: Path, prompts: Sequence[Prompt]) -> Opponent | None:
    """The opponent of a run's win-rates, `sample_opponent` having been there before; None where none is asked for.

    Raises:
        ConfigError: the completions are of other prompts.
    """
    if config.winrate == "off":
        return None
    if not config.against:
        return references(prompts)
    found = json.loads((run_folder / OPPONENTS).read_text(encoding="utf-8"))
    return opponent_of(config.against, found["completions"], prompts)


def opponent_of(name: str, completions: Mapping[str, str], prompts: Sequence[Prompt]) -> Opponent:
    """The model called `name` as the opponent.

    Args:
        completions: prompt id -> completion.
    Raises:
        ConfigError: it answered none of these prompts.
    """
    given = tuple(completions.get(prompt.prompt_id) for prompt in prompts)
    if all(completion is None for completion in given):
        raise ConfigError(
            f"{name} answered other prompts than the held-out ones; delete {OPPONENTS} in the run folder to have it asked again"
        )
    return Opponent(name=name, completions=given)


def sample_opponent(config: Config, run_folder: Path, say: Callable[[str], None]) -> None:
    """Have evaluation.against answer the held-out prompts, unless it did; its completions stay in the run folder.

    Raises:
        RunError: it cannot.
    """
    file, against = run_folder / OPPONENTS, config.evaluation.against
    if config.evaluation.winrate == "off" or not against:
        return
    asked = {"model": against, "prompts": _asked(config)}
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")).items() >= asked.items():
        return
    say(f"sampling greedy completions of {against}, to compare with")
    completions = ask_model(Path(against), config)
    write_atomically(file, json.dumps({**asked, "completions": completions}) + "\n")


def _asked(config: Config) -> dict[str, JsonValue]:
    """What decides the prompts of an evaluation, and how long their answers may be; a resumed run may have other settings."""
    sources = {name: asdict(source) for name, source in config.evaluation.sources.items()}
    return {"num_prompts": config.evaluation.num_prompts, "sources": sources, "max_new_tokens": config.generator.max_new_tokens}


def ask_model(model: Path, config: Config) -> dict[str, str]:
    """A model's greedy completions of the held-out prompts, by prompt id: in a process of its own, because an engine is not given back.

    Raises:
        RunError: it failed. Holds its last words.
    """
    unrated = RewardConfig(function=f"{zeros.__module__}:{zeros.__name__}")
    alone = replace(config, env={}, reward=unrated, evaluation=replace(config.evaluation, winrate="off", against=""))
    with tempfile.TemporaryDirectory(prefix="arlhf-eval-") as folder:
        settings, out = Path(folder) / "config.yaml", Path(folder) / "out.json"
        settings.write_text(to_yaml(alone), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "async_rlhf", "eval", str(model), str(settings), "--greedy", "--out", str(out)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            last = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()][-3:]
            raise RunError(f"{model} could not answer the held-out prompts (exit code {done.returncode}): {' / '.join(last)}")
        samples = json.loads(out.read_text(encoding="utf-8"))["samples"]
    return {sample["prompt_id"]: sample["completion"] for sample in samples}


def outcomes_by_score(own: Sequence[float], theirs: Sequence[float], completions: Sequence[str | None]) -> list[float | None]:
    """Per prompt: 1 where ours has the higher score, 0 where the opponent's has, 0.5 if equal; None where it did not answer.

    Args:
        own, theirs: metric, or reward, of each completion.
        completions: the opponent's.
    """
    return [None if completion is None else outcome for completion, outcome in zip(completions, by_score(own, theirs), strict=True)]


def outcomes_by_judge(
    comparer: Comparer, prompts: Sequence[Prompt], samples: Sequence[Sample], completions: Sequence[str | None]
) -> list[float | None]:
    """The same, decided by a judge.

    Raises:
        RewardError: it failed.
    """
    known = [(index, completion) for index, completion in enumerate(completions) if completion is not None]
    try:
        asked, own = [prompts[index] for index, _ in known], [samples[index].completion for index, _ in known]
        answers = [float(answer) for answer in comparer(asked, own, [theirs for _, theirs in known])]
        found = dict(zip((index for index, _ in known), answers, strict=True))
    except Exception as error:  # whatever a judge does: it ends this win-rate, and nothing else
        raise RewardError(f"the judge failed: {type(error).__name__}: {error}") from error
    wrong = [outcome for outcome in found.values() if not LOSS <= outcome <= WIN]
    if wrong:
        raise RewardError(f"the judge must answer from 0 to 1, got {wrong[0]!r}")
    return [found.get(index) for index in range(len(samples))]

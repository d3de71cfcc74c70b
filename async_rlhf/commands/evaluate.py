"""`async-rlhf eval`: what a finished model answers to the held-out prompts, in numbers and in words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from async_rlhf.commands.evaluation_table import print_findings
from async_rlhf.commands.resume import read_origin
from async_rlhf.commands.sampling import engine_of, policy_of, prepare_process, sample
from async_rlhf.commands.say import say
from async_rlhf.config import Config
from async_rlhf.errors import ConfigError, RewardError, RewardLostError
from async_rlhf.evaluation import Evaluation, Findings, measure
from async_rlhf.evaluation_log import read_evaluation
from async_rlhf.hub import with_local_models
from async_rlhf.model_folders import check_model_folder
from async_rlhf.opponents import (
    REFERENCES,
    Opponent,
    ask_model,
    check_opponent,
    opponent_of,
    outcomes_by_judge,
    outcomes_by_score,
    references,
    with_absolute_paths,
)
from async_rlhf.prompts import held_out_prompts
from async_rlhf.rewards import Reward, check_rewards, open_metric, open_reward
from async_rlhf.run_plan import is_separate, reward_and_metric
from async_rlhf.state import write_atomically
from async_rlhf.types import Prompt
from async_rlhf.winrate import load_comparer

if TYPE_CHECKING:
    from actors.assessor import Assessor


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the command line asks for beside the config."""

    against: str = ""
    """`references`, a model folder, or empty: what the config says."""
    judge: bool = False
    reference: Path | None = None
    greedy: bool = False
    samples: int = 5
    out: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Who is evaluated, and by what."""

    folder: Path
    """Of the model."""
    config: Config
    metric: str
    reward: str
    """Import path, like the metric's; the same where the run trains the metric."""
    reference: Path | None
    """Model that the divergence is measured from; None: it is not."""
    start: Evaluation | None
    """The run's completions before its first update; None: no run, or it has none."""

    @property
    def rated(self) -> bool:
        """Whether there is a reward that is not the metric."""
        return is_separate(self.config, self.reward, self.metric)


def run_evaluate(model: Path, words: list[str], wishes: Wishes, console: Console) -> int:
    """Sample one completion per held-out prompt, greedily and at the training temperature, and print what they are worth.

    Args:
        model: a Hugging Face folder, or a run folder: then its final policy, under its own config.
        words: config files and overrides, as for `train`.
    Returns:
        The process's exit code: 0, or 1 where the judge failed.
    Raises:
        ConfigError: no model there, or a wrong setting. RunError: the opponent could not be asked.
    """
    subject = _resolve(model, words, wishes)
    config = subject.config
    prompts = held_out_prompts(config, subject.folder)
    if subject.rated:
        check_rewards(config.reward, subject.reward)
    check_opponent(config.evaluation, prompts)
    opponent = _opponent(config, prompts, console)
    prepare_process()
    say(console, f"model: {subject.folder} ({config.generator.engine}), task {config.task.name}, {len(prompts)} held-out prompts")
    assessor = _assessor(subject)
    findings = _find(subject, prompts, assessor, wishes, console)
    findings = _rated_and_compared(subject, prompts, findings, opponent, assessor)
    numbers = measure(findings, subject.start)
    print_findings(console, findings, numbers, opponent, wishes.samples)
    if wishes.out is not None:
        _write(wishes.out, subject, findings, numbers)
        say(console, f"written: {wishes.out}")
    return 1 if findings.problem else 0


def _resolve(model: Path, words: list[str], wishes: Wishes) -> Subject:
    policy = policy_of(model, words)
    config, folder, of_run = _wished(policy.config, wishes), policy.folder, policy.of_run
    if of_run:
        origin = read_origin(model)
        metric, reward, reference = origin["metric"], origin["reward"], Path(origin["model_folder"])
    else:
        (reward, metric), reference = reward_and_metric(config), None
    reference = None if wishes.greedy else wishes.reference or reference
    if reference is not None:
        _check_reference(reference)
        _check_same_tokens(folder, reference)
    start = read_evaluation(model, "start") if of_run else None
    return Subject(folder=folder, config=config, metric=metric, reward=reward, reference=reference, start=start)


def _wished(config: Config, wishes: Wishes) -> Config:
    """The config with whom to compare, and who decides, as the command line has it."""
    evaluation = config.evaluation
    if wishes.against:
        against = "" if wishes.against == REFERENCES else wishes.against
        decides = evaluation.winrate if evaluation.winrate != "off" else "metric"
        evaluation = replace(evaluation, against=against, winrate=decides)
    if wishes.judge:
        evaluation = replace(evaluation, winrate="judge")
    return with_absolute_paths(with_local_models(replace(config, evaluation=evaluation)))


def _check_reference(reference: Path) -> None:
    try:
        check_model_folder(reference)
    except ConfigError as error:
        raise ConfigError(f"the reference {reference} cannot be used: {error}") from None


def _check_same_tokens(policy: Path, reference: Path) -> None:
    from transformers import AutoTokenizer

    own, other = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (policy, reference))
    if own != other:
        raise ConfigError(
            f"the KL to {reference} cannot be measured: its tokens ({len(other)}) are not those of {policy} ({len(own)}); give "
            "--reference a model with the policy's own tokenizer"
        )


def _opponent(config: Config, prompts: Sequence[Prompt], console: Console) -> Opponent | None:
    if config.evaluation.winrate == "off":
        return None
    if not config.evaluation.against:
        return references(prompts)
    say(console, f"sampling greedy completions of {config.evaluation.against}, to compare with")
    return opponent_of(config.evaluation.against, ask_model(Path(config.evaluation.against), config), prompts)


def _assessor(subject: Subject) -> "Assessor":
    from transformers import AutoTokenizer

    from actors.assessor import Assessor
    from actors.reference import ReferencePolicy

    metric = open_metric(subject.config.reward, subject.reward, subject.metric)
    reference = ReferencePolicy(subject.reference, subject.config) if subject.reference is not None else None
    return Assessor(AutoTokenizer.from_pretrained(subject.folder), metric, reference)


def _find(subject: Subject, prompts: Sequence[Prompt], assessor: "Assessor", wishes: Wishes, console: Console) -> Findings:
    """Greedy and, unless it is not wanted, sampled completions, judged."""
    config = subject.config
    temperatures = [0.0] if wishes.greedy else [0.0, config.generator.temperature]
    found: list[Evaluation] = []
    with engine_of(config, subject.folder) as generator:
        for temperature in temperatures:
            samples = assessor.assess(prompts, sample(generator, prompts, temperature, console), temperature > 0)
            found.append(Evaluation(version=0, temperature=temperature, samples=tuple(samples)))
    return Findings(stage="final", version=0, greedy=found[0], sampled=found[1] if len(found) > 1 else None)


def _rated_and_compared(
    subject: Subject, prompts: Sequence[Prompt], findings: Findings, opponent: Opponent | None, assessor: "Assessor"
) -> Findings:
    """With the run's reward of each completion and, where there is an opponent, the outcome; or with the reason why there is none."""
    config, reward = subject.config, None
    try:
        if subject.rated:
            reward = open_reward(config.reward, subject.reward)
            sampled = None if findings.sampled is None else _rated(reward, prompts, findings.sampled)
            findings = replace(findings, greedy=_rated(reward, prompts, findings.greedy), sampled=sampled)
        if opponent is None:
            return findings
        samples, completions = findings.greedy.samples, opponent.completions
        theirs = [completion or "" for completion in completions]
        if config.evaluation.winrate == "judge":
            outcomes = outcomes_by_judge(load_comparer(config.evaluation.judge), prompts, samples, completions)
        elif config.evaluation.winrate == "reward" and reward is not None:
            ratings = reward.rate(prompts, theirs).scores.tolist()
            outcomes = outcomes_by_score([sample.reward or 0.0 for sample in samples], ratings, completions)
        else:
            outcomes = outcomes_by_score(findings.greedy.scores, assessor.grade(prompts, theirs), completions)
    except (RewardError, RewardLostError) as error:
        return replace(findings, problem=str(error))
    finally:
        if reward is not None:
            reward.close()
    compared = tuple(replace(sample, outcome=outcome) for sample, outcome in zip(samples, outcomes, strict=True))
    return replace(findings, greedy=replace(findings.greedy, samples=compared), opponent=opponent.name)


def _rated(reward: Reward, prompts: Sequence[Prompt], evaluation: Evaluation) -> Evaluation:
    scores = reward.rate(prompts, [sample.completion for sample in evaluation.samples]).scores.tolist()
    pairs = zip(evaluation.samples, scores, strict=True)
    return replace(evaluation, samples=tuple(replace(sample, reward=score) for sample, score in pairs))


def _write(file: Path, subject: Subject, findings: Findings, numbers: Mapping[str, float]) -> None:
    found = {
        "model": str(subject.folder),
        "task": subject.config.task.name,
        "temperature": subject.config.generator.temperature,
        "reference": str(subject.reference) if subject.reference else None,
        "opponent": findings.opponent or None,
        "decided_by": subject.config.evaluation.winrate if findings.opponent else None,
        "numbers": dict(numbers),
        "samples": [asdict(sample) for sample in findings.greedy.samples],
        "sampled": [asdict(sample) for sample in findings.sampled.samples] if findings.sampled else [],
    }
    write_atomically(file.resolve(), json.dumps(found, indent=1) + "\n")

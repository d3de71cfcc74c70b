"""A language model as judge, behind an OpenAI-compatible chat endpoint: grades, or which of two completions is better."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np

from async_rlhf.config.rewards import JudgeConfig, RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.rewards.attempts import BackgroundLoop, TryAgainError, in_order
from async_rlhf.rewards.base import Rating, shown, texts_of
from async_rlhf.rewards.client import Address, JsonClient, probe
from async_rlhf.types import Prompt

GRADE_RUBRIC = """You grade an answer to a request. Judge how correct, helpful and honest it is; length alone is no merit.

[Request]
{prompt}

[Answer]
{completion}

[End]
Reply with one number from 0 (useless or harmful) to {max_grade} (could not be better), and nothing else."""

COMPARE_RUBRIC = """You compare two answers to a request. Judge how correct, helpful and honest they are.
Neither length nor order is a merit.

[Request]
{prompt}

[First answer]
{first}

[Second answer]
{second}

[End]
Reply with one word: FIRST or SECOND, whichever answer is better, or TIE."""

REMINDERS = {"pointwise": "\nReply with the number alone.", "pairwise": "\nReply with FIRST, SECOND or TIE alone."}
"""Added after an answer that said nothing: at temperature 0 the same question would get the same answer."""

PLACEHOLDERS = {"pointwise": ("prompt", "completion"), "pairwise": ("prompt", "first", "second")}

THOUGHTS = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
"""What a reasoning model writes before its answer."""
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")
VERDICT = re.compile(r"\b(first|second|tie|[12])\b", re.IGNORECASE)
VERDICTS = {"first": 1.0, "1": 1.0, "second": 0.0, "2": 0.0, "tie": 0.5}


def judge_address(key: str, judge: JudgeConfig) -> Address:
    """Where the judge named by `key` is asked."""
    return Address(key=f"{key}.url", url=judge.url, token_env=judge.token_env, allow_plain_http=judge.allow_plain_http)


def check_judge(key: str, judge: JudgeConfig) -> None:
    """Read the rubric, and ask the endpoint for its models.

    Raises:
        ConfigError: nobody answers there, it knows no such model, or the rubric lacks a placeholder.
    """
    for name in ("url", "model"):
        if not getattr(judge, name):
            raise ConfigError(f"{key}.{name} must be set: a judge needs the base address of its endpoint, and the name of its model there")
    read_rubric(key, judge)
    answer = probe(judge_address(key, judge), "GET", f"{judge.url.rstrip('/')}/models")
    try:
        known = [str(model["id"]) for model in answer["data"]]
    except (TypeError, KeyError):
        return
    if known and judge.model not in known:
        raise ConfigError(f"{key}.model: {judge.url} knows no model {judge.model!r}; it has: {', '.join(known[:20])}")


def read_rubric(key: str, judge: JudgeConfig) -> str:
    """What the judge is told, with its placeholders.

    Raises:
        ConfigError: the file cannot be read, or lacks one of them.
    """
    if not judge.rubric:
        return GRADE_RUBRIC if judge.mode == "pointwise" else COMPARE_RUBRIC
    try:
        text = Path(judge.rubric).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}.rubric {judge.rubric} cannot be read: {error}") from None
    missing = [name for name in PLACEHOLDERS[judge.mode] if f"{{{name}}}" not in text]
    if missing:
        raise ConfigError(f"{key}.rubric {judge.rubric} must hold {{{missing[0]}}}, where a {judge.mode} judge reads the {missing[0]}")
    return text


def grade_in(answer: str, max_grade: float) -> float:
    """The first number of the answer.

    Raises:
        TryAgainError: there is none, or it is not from 0 to max_grade.
    """
    found = NUMBER.search(THOUGHTS.sub("", answer))
    if found is None or not 0.0 <= float(found[0]) <= max_grade:
        raise TryAgainError(f"the judge must answer with a number from 0 to {max_grade:g}, got {shown(answer)}")
    return float(found[0])


def verdict_in(answer: str) -> float:
    """1 the first is better, 0 the second, 0.5 a tie.

    Raises:
        TryAgainError: the answer has none of these words.
    """
    found = VERDICT.search(THOUGHTS.sub("", answer))
    if found is None:
        raise TryAgainError(f"the judge must answer with FIRST, SECOND or TIE, got {shown(answer)}")
    return VERDICTS[found[0].lower()]


class Judge:
    """Asks the endpoint, `settings.concurrency` questions at once, at temperature 0."""

    def __init__(self, key: str, judge: JudgeConfig, settings: RewardPartConfig) -> None:
        """
        Raises:
            ConfigError: the address may not be asked, or the rubric is none.
        """
        self._judge = judge
        self._settings = settings
        self._rubric = read_rubric(key, judge)
        self._client = JsonClient(judge_address(key, judge), settings)
        self._loop = BackgroundLoop()

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """[N] float32 grades, from 0 to 1."""

        async def ask(index: int) -> float:
            fields = {"prompt": conversation(prompts[index]), "completion": completions[index]}
            try:
                grade = await self._ask(fields, lambda answer: grade_in(answer, self._judge.max_grade))
            except RewardError as error:
                raise RewardError(f"{error}; completion {shown(completions[index])} of prompt {shown(prompts[index].text)}") from error
            return grade / self._judge.max_grade

        return self._gather(range(len(completions)), ask)

    def compare(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """[N] float32: 1 where the first is better, 0 the second, 0.5 neither. Asked in both orders, and averaged.

        A judge that prefers a place, and not an answer, thus says 0.5.
        """

        async def ask(question: tuple[int, bool]) -> float:
            index, swapped = question
            shown_first, shown_second = (second, first) if swapped else (first, second)
            fields = {"prompt": conversation(prompts[index]), "first": shown_first[index], "second": shown_second[index]}
            try:
                verdict = await self._ask(fields, verdict_in)
            except RewardError as error:
                raise RewardError(f"{error}; completions {shown(first[index])} and {shown(second[index])}") from error
            return 1.0 - verdict if swapped else verdict

        questions = [(index, swapped) for index in range(len(first)) for swapped in (False, True)]
        return self._gather(questions, ask).reshape(-1, 2).mean(axis=1)

    def close(self) -> None:
        """Close the connections."""
        self._loop.run(self._client.close())
        self._loop.close()

    def _gather(self, questions: Sequence[Any], ask: Callable[[Any], Any]) -> np.ndarray:
        return np.array(self._loop.run(in_order(questions, ask, self._settings.concurrency)), dtype=np.float32)

    async def _ask(self, fields: Mapping[str, str], read: Callable[[str], float]) -> float:
        judge = self._judge

        def body(attempt: int) -> Mapping[str, Any]:
            question = filled(self._rubric, {**fields, "max_grade": f"{judge.max_grade:g}"})
            content = question + (REMINDERS[judge.mode] if attempt else "")
            messages = [{"role": "user", "content": content}]
            return {"model": judge.model, "messages": messages, "temperature": 0.0, "max_tokens": judge.max_tokens}

        return await self._client.ask(body, lambda answer: read(_content(answer)), f"{judge.url.rstrip('/')}/chat/completions")


class JudgeReward:
    """Grades, or each completion's share of wins against its siblings."""

    def __init__(self, key: str, part: RewardPartConfig) -> None:
        """
        Raises:
            ConfigError: see Judge.
        """
        self._pairwise = part.judge.mode == "pairwise"
        self._judge = Judge(f"{key}.judge", part.judge, part)

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
        """See Reward."""
        texts_of(prompts, completions)
        return Rating(scores=self._wins(prompts, completions) if self._pairwise else self._judge.grade(prompts, completions))

    def close(self) -> None:
        """See Reward."""
        self._judge.close()

    def _wins(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        pairs = [pair for members in siblings(prompts) for pair in combinations(members, 2)]
        verdicts = self._judge.compare(
            [prompts[one] for one, _ in pairs], [completions[one] for one, _ in pairs], [completions[other] for _, other in pairs]
        )
        wins = np.zeros(len(completions), dtype=np.float32)
        for (one, other), verdict in zip(pairs, verdicts, strict=True):
            wins[one] += verdict
            wins[other] += 1.0 - verdict
        rivals = np.concatenate([np.empty(0), *(np.full(len(members), len(members) - 1) for members in siblings(prompts))])
        # Alone, as in an evaluation, a completion is neither better nor worse.
        return np.where(rivals > 0, wins / np.maximum(rivals, 1), 0.5).astype(np.float32)


def compare(
    judge: JudgeConfig, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], settings: RewardPartConfig | None = None
) -> np.ndarray:
    """Ask a pairwise judge once: [N] float32, 1 where the first completion is better, 0 the second, 0.5 neither.

    Args:
        settings: deadline, attempts and concurrency; None: the defaults.
    Raises:
        ConfigError: the judge's settings are none. RewardError: it gave no verdict. RewardLostError: it cannot be reached.
    """
    from dataclasses import replace

    asked = Judge("evaluation.judge", replace(judge, mode="pairwise"), settings or RewardPartConfig())
    try:
        return asked.compare(prompts, first, second)
    finally:
        asked.close()


def siblings(prompts: Sequence[Prompt]) -> list[range]:
    """The runs of one and the same Prompt object."""
    starts = [index for index in range(len(prompts)) if index == 0 or prompts[index] is not prompts[index - 1]]
    return [range(begin, end) for begin, end in zip(starts, [*starts[1:], len(prompts)], strict=True)]


def filled(rubric: str, fields: Mapping[str, str]) -> str:
    """The rubric with its placeholders replaced, all at once: what a completion says in braces stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), rubric)


def conversation(prompt: Prompt) -> str:
    """The prompt as a judge reads it: chat messages by who said them, else the text."""
    messages = prompt.columns.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return prompt.text
    said = cast(list[dict[str, Any]], messages)
    return "\n\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in said)


def _content(answer: Any) -> str:
    """The text of a chat completion."""
    try:
        content = answer["choices"][0]["message"]["content"]
    except (TypeError, KeyError, IndexError):
        raise RewardError(f"the judge's endpoint must answer with choices[0].message.content, got {shown(answer)}") from None
    return content if isinstance(content, str) else ""
